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
from benchmarks._layer import BLOCK, Both, Given, Weights, Work
from benchmarks._stack import Stack
from benchmarks._topk_sides import Sides
from fd_dsa.attention import DSAAttentionBackend
from fd_dsa.attention.overlap import IndexerOverlap

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


class PeerWork(Work):
    """A layer by other projects' kernels; their memory and schedules are those of its stack."""

    stack: PeerStack

    def write(self, kv_a: torch.Tensor, index_k: torch.Tensor, write: Any, meta: Any) -> None:
        """Norms and both writes."""
        functional, weights, stack = torch.nn.functional, self.layer.weights, self.stack
        rank = self.layer.sizes.rank
        latent = functional.rms_norm(kv_a[:, :rank], (rank,), stack.kv_norm)
        key = functional.layer_norm(index_k, (_DIM,), weights.k_norm, weights.k_bias, 1e-6)
        rest = *self.given.caches_of(write.layer_id), stack.new_slots, stack.no_scale
        _peers.vllm_writes(stack.writes, latent, kv_a[:, rank:], key, *rest)

    def index_query(self, q: torch.Tensor, weights: torch.Tensor) -> Both:
        """vLLM's launch."""
        stack = self.stack
        rest = self.given.angles, weights, *stack.queries
        _peers.prepare_indexer_query(stack.indexer_query, stack.positions, q, *rest)
        return stack.queries

    def scores(self, layer_id: int) -> torch.Tensor:
        """DeepGEMM's, of all keys."""
        stack, given = self.stack, self.given
        (codes, folded), (_, index) = stack.queries, given.caches_of(layer_id)
        rows = folded, stack.lengths, given.tables, stack.logits_schedule
        return stack.gemm.score_pages(codes, index, *rows, given.shape.keys)

    def select(self, q: torch.Tensor, weights: torch.Tensor, layer_id: int, meta: Any) -> Any:
        """The chosen top-k, and a conversion of its positions to slots."""
        stack, tables = self.stack, self.given.tables
        stack.choose(self.scores(layer_id))
        rows, k = stack.slots.shape
        _slots_kernel[rows, k // 128](stack.topk.out, tables, tables.shape[1], stack.slots, K=k)
        return stack.slots

    def attend(self, query: torch.Tensor, slots: torch.Tensor, layer_id: int, meta: Any) -> Any:
        """FlashMLA with the step's schedule, or with none and then the one that it made."""
        stack, heads = self.stack, query.shape[1]
        _, ops, takes_out = stack.build
        if heads < _PADDED_HEADS:
            stack.wide[:, :heads].copy_(query)
            query = stack.wide
        latents, scale = self.given.caches_of(layer_id)[0], self.layer.sizes.scale
        out, stack.schedule = _peers.flash_mla_decode(
            ops, takes_out, query, latents, slots, stack.schedule, scale
        )
        return out[:, :heads]


class PeerStack(Stack):
    """A step by other projects' kernels.

    Args:
        given, weights: as of a Stack.
        backend: for the buffer of the absorbed queries alone.
        peers: folder of the kernels.

    Attributes:
        made_by: which of several kernels were the fastest here.
        queries: codes and weights of the indexer's queries.

    Raises:
        LookupError: one of the kernels is not there.
    """

    work = PeerWork
    # both projections of the indexer in line
    overlap = IndexerOverlap("gpu", 0)

    def __init__(
        self,
        given: Given,
        weights: Sequence[Weights],
        backend: DSAAttentionBackend,
        peers: Path | None,
    ) -> None:
        super().__init__(given, weights, backend)
        for work, _ in self.layers:
            work.stack = self
        self.writes = _peers.vllm_cache_ops(peers)
        self.indexer_query = _peers.vllm_indexer_query(peers)
        builds, self.gemm = _peers.flash_mla_builds(peers), _peers.deep_gemm(peers)
        if self.writes is None or self.indexer_query is None or not builds:
            raise LookupError("kernels of vLLM")
        if self.gemm is None:
            raise LookupError("DeepGEMM")
        rows, keys = given.shape.rows, given.shape.keys
        s, how = given.sizes, {"device": given.device}
        self.lengths = torch.full((rows, 1), keys, dtype=torch.int32, **how)
        self.positions = (self.lengths[:, 0] - 1).long()
        self.new_slots = given.tables[:, -1].long() * BLOCK + (keys - 1) % BLOCK
        codes = torch.empty(rows, s.index_heads, _DIM, dtype=torch.float8_e4m3fn, **how)
        self.queries = codes, torch.empty(rows, s.index_heads, **how)
        self.slots = torch.empty(rows, s.topk, dtype=torch.int32, **how)
        self.no_scale = torch.ones(1, **how)
        self.kv_norm = torch.ones(s.rank, dtype=torch.bfloat16, **how)
        shape = rows, _PADDED_HEADS, s.rank + s.rope
        self.wide = torch.zeros(shape, dtype=torch.bfloat16, **how)
        self.made_by: dict[str, str] = {}
        self._choose_kernels(builds, peers)

    def begin(self) -> None:
        """The schedules of a step; FlashMLA makes its own in the first layer."""
        self.logits_schedule = self.gemm.schedule(self.lengths)
        self.schedule: Any = None, None

    def project(self, weights: Weights) -> Any:
        """Two GEMMs."""
        return lambda x: (x @ weights.wk, x @ weights.weights_proj)

    def _choose_kernels(self, builds: list[tuple[str, Any, bool]], peers: Path | None) -> None:
        """The fastest exact top-k and the faster build of FlashMLA, on inputs of the first layer.

        Raises:
            LookupError: there is no exact top-k.
        """
        self.begin()
        shape, (work, write) = self.given.shape, self.layers[0]
        self.topk = Sides(shape.rows, shape.keys, self.given.sizes.topk, peers)
        sides = self.topk.exact()
        del sides["torch"]
        if not sides:
            raise LookupError("an exact top-k")
        qr, _ = work.down(work.layer.weights.down)
        work.index_query(work.index_heads(qr), self.given.x @ work.layer.weights.weights_proj)
        scores = work.scores(write.layer_id)
        best = fastest({name: lambda side=side: side(scores) for name, side in sides.items()})
        self.made_by["top-k"], self.choose = best, sides[best]
        slots = work.select(*self.queries, write.layer_id, None)
        query = work.query(*work.absorbed(qr))

        def call(build: Any) -> _gpu.Call:
            self.build, self.schedule = build, (None, None)
            work.attend(query, slots, write.layer_id, None)
            made = self.schedule

            def attend() -> None:
                self.build, self.schedule = build, made
                work.attend(query, slots, write.layer_id, None)

            return attend

        best = fastest({build[0]: call(build) for build in builds})
        self.made_by["attention"] = best
        self.build = next(build for build in builds if build[0] == best)
