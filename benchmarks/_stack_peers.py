"""A step of the same stack made of other projects' kernels, as far as `--peers` has them.

vLLM's writes and indexer query, DeepGEMM's scores, the fastest exact top-k of vLLM and FlashInfer,
a conversion to slots, the faster build of FlashMLA. Schedules are made once a step. GEMMs are
torch's, as in ours, and the absorbed query is prepared by our launch. The keys are normed by torch
and not rotated, which leaves the peers less to do than ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _gpu, _peers
from benchmarks._layer import BLOCK, Both, Weights, Work
from benchmarks._stack import Given, OneLayer
from benchmarks._stack_shapes import LAYERS, RANK
from benchmarks._topk_sides import Side, Sides
from fd_dsa.attention import DSAAttentionBackend

import triton  # isort: skip
import triton.language as tl  # isort: skip

_DIM = 128
_PADDED_HEADS = 64


@triton.jit
def _slots_kernel(positions_ptr, tables_ptr, columns, slots_ptr, K: tl.constexpr):
    """Slots of a row's positions, 128 in a program; -1 stays."""
    row, k = tl.program_id(0), tl.program_id(1) * 128 + tl.arange(0, 128)
    position = tl.load(positions_ptr + row * K + k)
    block = tl.load(tables_ptr + row * columns + position // 64, mask=position >= 0, other=0)
    tl.store(slots_ptr + row * K + k, tl.where(position < 0, -1, block * 64 + position % 64))


def fastest(sides: Mapping[str, _gpu.Call]) -> str:
    """The side that takes least time in a graph."""
    times = _gpu.interleaved({k: [call] for k, call in sides.items()}, mode="graph", rounds=5)
    return min(times, key=lambda label: times[label]["p50"])


class PeerStack:
    """A step by other projects' kernels.

    Args:
        given, weights: as of a Stack.
        backend: for the buffer of the absorbed queries alone.
        peers: folder of the kernels.

    Attributes:
        made_by: which of several kernels were the fastest here.

    Raises:
        LookupError: one of the kernels is not there.
    """

    def __init__(
        self,
        given: Given,
        weights: Sequence[Weights],
        backend: DSAAttentionBackend,
        peers: Path | None,
    ) -> None:
        self.given, self._writes = given, _peers.vllm_cache_ops(peers)
        self._indexer_query = _peers.vllm_indexer_query(peers)
        builds = _peers.flash_mla_builds(peers)
        if self._writes is None or self._indexer_query is None or not builds:
            raise LookupError("kernels of vLLM")
        gemm = _peers.deep_gemm(peers)
        if gemm is None:
            raise LookupError("DeepGEMM")
        self._gemm = gemm
        inputs = given.x, given.cos_sin, given.out
        self._layers = [
            (
                Work(OneLayer(given.sizes, weights[n % len(weights)], backend), *inputs),
                *given.caches[n % len(given.caches)],
            )
            for n in range(LAYERS)
        ]
        self._allocate()
        self.made_by: dict[str, str] = {}
        self._choose_topk(peers)
        self._choose_attention(builds)

    def _allocate(self) -> None:
        """What does not depend on a layer."""
        given, rows = self.given, self.given.shape.rows
        s, how = given.sizes, {"device": given.device}
        self._tables = given.tables
        self._lengths = torch.full((rows, 1), given.shape.keys, dtype=torch.int32, **how)
        self._positions = (self._lengths[:, 0] - 1).long()
        self._new_slots = self._tables[:, -1].long() * BLOCK + (given.shape.keys - 1) % BLOCK
        self._codes = torch.empty(rows, s.index_heads, _DIM, dtype=torch.float8_e4m3fn, **how)
        self._folded = torch.empty(rows, s.index_heads, **how)
        self._slots = torch.empty(rows, s.topk, dtype=torch.int32, **how)
        self._no_scale = torch.ones(1, **how)
        self._kv_norm = torch.ones(RANK, dtype=torch.bfloat16, **how)
        self._wide = None
        if s.heads < _PADDED_HEADS:
            width = RANK + s.rope
            self._wide = torch.zeros(rows, _PADDED_HEADS, width, dtype=torch.bfloat16, **how)

    def step(self) -> None:
        """One step; the result of the last layer is in `given.out`."""
        logits_schedule = self._gemm.schedule(self._lengths)
        schedule: Any = None, None
        for work, latents, index in self._layers:
            *_, latent, schedule = self._layer(work, latents, index, logits_schedule, schedule)
            work.project_out(latent)

    def first_layer(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Both]:
        """Slots, queries and attended latents of the first layer, and the indexer's queries."""
        schedule = self._gemm.schedule(self._lengths)
        query, latent, _ = self._layer(*self._layers[0], schedule, (None, None))
        return self._slots, query, latent, (self._codes, self._folded)

    def _layer(
        self, work: Work, latents: Any, index: Any, logits_schedule: Any, schedule: Any
    ) -> tuple[Any, Any, Any]:
        """A layer but for its last products: queries, attended latents, FlashMLA's schedule."""
        weights = work.layer.weights
        qr, kv_a = work.down(weights.down)
        self._write(kv_a, self.given.x @ weights.wk, weights, latents, index)
        self._prepare(qr @ weights.wq_b, self.given.x @ weights.weights_proj)
        self._choose(self._scores(index, logits_schedule))
        self._convert()
        query = work.query(*work.absorbed(qr))
        latent, schedule = self._attend(self._attention, query, latents, schedule)
        return query, latent, schedule

    def _write(self, kv_a: Any, index_k: Any, weights: Weights, latents: Any, index: Any) -> None:
        """Norms and both writes."""
        functional = torch.nn.functional
        latent = functional.rms_norm(kv_a[:, :RANK], (RANK,), self._kv_norm)
        key = functional.layer_norm(index_k, (_DIM,), weights.k_norm, weights.k_bias, 1e-6)
        finished = latent, kv_a[:, RANK:], key
        _peers.vllm_writes(self._writes, *finished, latents, index, self._new_slots, self._no_scale)

    def _prepare(self, q: torch.Tensor, weights: torch.Tensor) -> None:
        """The indexer's queries."""
        rest = self.given.angles, weights, self._codes, self._folded
        q = q.view(self._codes.shape)
        _peers.prepare_indexer_query(self._indexer_query, self._positions, q, *rest)

    def _scores(self, index: torch.Tensor, schedule: Any) -> torch.Tensor:
        """DeepGEMM's, of all keys."""
        rows = self._folded, self._lengths, self._tables, schedule
        return self._gemm.score_pages(self._codes, index, *rows, self.given.shape.keys)

    def _convert(self) -> None:
        """Slots of the chosen positions."""
        rows, k = self._slots.shape
        columns = self._tables.shape[1]
        _slots_kernel[rows, k // 128](self._topk.out, self._tables, columns, self._slots, K=k)

    def _attend(self, build: Any, query: Any, latents: Any, schedule: Any) -> tuple[Any, Any]:
        """FlashMLA with a schedule, or with none and then the one that it made."""
        _, ops, takes_out = build
        heads = query.shape[1]
        if self._wide is not None:
            self._wide[:, :heads].copy_(query)
            query = self._wide
        scale = self.given.sizes.scale
        out, schedule = _peers.flash_mla_decode(
            ops, takes_out, query, latents, self._slots, schedule, scale
        )
        return out[:, :heads], schedule

    def _choose_topk(self, peers: Path | None) -> None:
        """The fastest exact top-k, on scores as the layers have them."""
        shape, k = self.given.shape, self.given.sizes.topk
        self._topk = Sides(shape.rows, shape.keys, k, peers)
        sides: dict[str, Side] = self._topk.exact()
        del sides["torch"]
        if not sides:
            raise LookupError("an exact top-k")
        work, _, index = self._layers[0]
        qr, _ = work.down(work.layer.weights.down)
        weights = work.layer.weights
        self._prepare(qr @ weights.wq_b, self.given.x @ weights.weights_proj)
        scores = self._scores(index, self._gemm.schedule(self._lengths))
        calls = {name: lambda side=side: side(scores) for name, side in sides.items()}
        self.made_by["top-k"] = fastest(calls)
        self._choose = sides[self.made_by["top-k"]]
        self._choose(scores)
        self._convert()

    def _choose_attention(self, builds: list[tuple[str, Any, bool]]) -> None:
        """The faster build of FlashMLA."""
        work, latents, _ = self._layers[0]
        qr, _ = work.down(work.layer.weights.down)
        query = work.query(*work.absorbed(qr))

        def call(build: Any) -> _gpu.Call:
            _, schedule = self._attend(build, query, latents, (None, None))
            return lambda: self._attend(build, query, latents, schedule)

        best = fastest({build[0]: call(build) for build in builds})
        self.made_by["attention"] = best
        self._attention = next(build for build in builds if build[0] == best)
