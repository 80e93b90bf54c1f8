"""A step of a stack of layers: metadata once, then 61 layers over shared buffers.

The layers are those of `_layer.py`. They have the same hidden states, block tables and memory for
results; weights and caches take turns as far as there is room, and between two uses of a cache
more is read than the L2 holds.

The other sides run the same kernels and do in every layer what FastDeploy did: see `Chained`,
`Scheduled` and `Everything`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import _logits_sides, _sparse_mla_sides
from benchmarks._layer import BLOCK, LAYERS, Both, Given, Layer, Weights, Work, cache_write
from fd_dsa.attention import DSAAttentionBackend
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.ops.cache_write import write_caches
from fd_dsa.ops.indexer_projection import triton_kernel
from fd_dsa.step import ForwardMeta


class Stack:
    """Ours: metadata and schedules once a step.

    Args:
        given: inputs.
        weights: of the layers, in turn.
        backend: of all layers.
    """

    work: type[Work] = Work

    def __init__(
        self, given: Given, weights: Sequence[Weights], backend: DSAAttentionBackend
    ) -> None:
        self.given, self.backend = given, backend
        self._out = backend.attention.projection_buffers(given.shape.rows)
        self.layers = [
            (
                self.work(Layer(given.sizes, weights[n % len(weights)], backend), given),
                cache_write(given.sizes, given.device, n),
            )
            for n in range(LAYERS)
        ]

    def step(self, layers: int = LAYERS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step, or the first layers of one; what `Work.run` returns of the last layer."""
        meta, found = self.begin(), None
        for work, write in self.layers[:layers]:
            self.before_layer(meta)
            found = work.run(self.overlap, self.project(work.layer.weights), write, meta)
        assert found is not None
        return found

    @property
    def overlap(self) -> IndexerOverlap:
        """What may fork the projections of the indexer."""
        return self.backend.overlap

    def begin(self) -> Any:
        """The metadata of a step."""
        return self.given.begin(self.backend)

    def before_layer(self, meta: Any) -> None:
        """Nothing is made for a layer alone."""

    def project(self, weights: Weights) -> Any:
        """A function of hidden states: index keys and head weights."""
        both = weights.wk, weights.weights_proj
        return lambda x: triton_kernel.project_indexer(x, *both, self._out)


class PackageWork(Work):
    """A layer without torch's GEMMs, whose results are those of the first layer, made once."""

    def __init__(self, layer: Layer, given: Given) -> None:
        super().__init__(layer, given)
        if not hasattr(given, "made"):
            qr, kv_a = super().down(layer.weights.down)
            given.made = (qr, kv_a), super().index_heads(qr), super().absorbed(qr)
        self._down, self._index_heads, self._absorbed = given.made

    def down(self, weight: Any) -> Both:
        """Made."""
        return self._down

    def index_heads(self, qr: torch.Tensor) -> torch.Tensor:
        """Made."""
        return self._index_heads

    def absorbed(self, qr: torch.Tensor) -> Both:
        """Made."""
        return self._absorbed

    def project_out(self, latent: torch.Tensor) -> None:
        """Left out."""


class PackageAlone(Stack):
    """The package's part of a step, to be checked and counted."""

    work = PackageWork


def slot_chain(step: ForwardMeta) -> torch.Tensor:
    """`slot_mapping` as every layer computed it, from positions and rows."""
    positions = step.position_ids
    blocks = step.block_tables[step.batch_id_per_token, positions // BLOCK]
    return (blocks * BLOCK + positions % BLOCK).to(torch.int64)


class ChainedWork(Work):
    """Slots are computed for each of the two caches."""

    def write(self, kv_a: torch.Tensor, index_k: torch.Tensor, write: Any, meta: Any) -> None:
        """Both chains, and our write to the slots of the second."""
        slot_chain(meta.fd_dsa_step)
        slots = slot_chain(meta.fd_dsa_step)
        rest = *self.given.caches_of(write.layer_id), write.cache_write_params(None)
        write_caches(kv_a, index_k, None, slots, self.given.cos_sin, *rest)


class Chained(Stack):
    """A: `slot_mapping` twice in every layer, as before FastDeploy #7367."""

    work = ChainedWork


class Scheduled(Chained):
    """B: A, and in every layer the schedule; where the host launches, it waits once a layer.

    FastDeploy's wait is that for the longest window of a step with a prompt. A capture refuses it.
    """

    def before_layer(self, meta: Any) -> None:
        """Both."""
        self.backend.attention.begin_step(meta.fd_dsa_step)
        if not torch.cuda.is_current_stream_capturing():
            meta.fd_dsa_step.seq_lens_decoder.max().item()


class EverythingWork(ChainedWork):
    """What FastDeploy's layers of a decode step do besides."""

    def write(self, kv_a: torch.Tensor, index_k: torch.Tensor, write: Any, meta: Any) -> None:
        """A scale that nothing reads, and a new selection filled with -1."""
        _ = kv_a[:, : self.layer.sizes.rank].abs().max() / 200
        shape = self.num_tokens, self.layer.sizes.topk
        torch.full(shape, -1, device=kv_a.device, dtype=torch.int32)
        super().write(kv_a, index_k, write, meta)


class Everything(Scheduled):
    """B and what else FastDeploy's layers of a decode step launch."""

    work = EverythingWork


def plain_check(
    given: Given, slots: torch.Tensor, query: torch.Tensor, out: torch.Tensor, queries: Both
) -> dict[str, float]:
    """Compare a side's first layer with sums in doubles, for three tokens.

    Args:
        given: inputs of the side.
        slots, query, out: of the layer, as `Work.run` returns them.
        queries: e4m3 codes [rows, index_heads, 128] and float32 [rows, index_heads].

    Returns:
        `recall`, the least share of the best keys that was chosen, and `attention`, the relative
        error of the attended latents over the slots that were chosen.
    """
    (latents, index), rows = given.caches[0], given.shape.rows
    tables, recall, off, size = given.tables, 1.0, 0.0, 0.0
    for token in sorted({0, rows // 2, rows - 1}):
        scores = _logits_sides.exact_scores(
            queries[0][token], queries[1][token], index, tables[token]
        )
        best = scores.topk(min(given.sizes.topk, len(scores))).indices
        wanted = tables[token][best // BLOCK] * BLOCK + best % BLOCK
        recall = min(recall, float(torch.isin(wanted, slots[token]).double().mean()))
        chosen = slots[token][slots[token] >= 0].long()
        keys = _sparse_mla_sides.latents_of(latents.flatten(0, 2)[chosen])
        exact = _sparse_mla_sides.exact_attention(query[token], keys, given.sizes.scale)
        off += float((out[token].double() - exact).square().sum())
        size += float(exact.square().sum())
    return {"recall": recall, "attention": (off / size) ** 0.5}
