"""A step of a stack of layers: metadata once, then 61 layers over shared buffers.

The layers are those of `_layer.py`. They have the same hidden states, block tables and memory for
results; weights and caches take turns as far as there is room, and between two uses of a cache
more is read than the L2 holds.

The other sides run the same kernels and do in every layer what FastDeploy did: see `Chained`,
`Scheduled` and `Everything`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import _gpu, _logits_sides, _sparse_mla_sides
from benchmarks._layer import (
    BLOCK,
    Both,
    Sizes,
    Weights,
    Work,
    allocator,
    cache_write,
    config_of,
)
from benchmarks._stack_shapes import LATENT_BYTES, LAYERS, RANK, Shape
from fd_dsa.attention import DSAAttentionBackend, StepHints
from fd_dsa.ops.cache_write import write_caches
from fd_dsa.ops.indexer_projection import triton_kernel
from fd_dsa.step import ForwardMeta


class Pool:
    """Random caches of both kinds, of which layers take parts."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._latents = _sparse_mla_sides.record_cache(num_blocks * BLOCK)
        self._index = _logits_sides.random_cache(num_blocks)

    def caches(self, shape: Shape) -> list[Both]:
        """Latents and index keys of as many layers as there is room for, at most all."""
        size = shape.cache_blocks
        starts = [n * size for n in range(min(LAYERS, self.num_blocks // size))]
        pages = self._latents.view(-1, 1, BLOCK, LATENT_BYTES)
        return [(pages[n : n + size], self._index[n : n + size]) for n in starts]


class Given:
    """Inputs of a step that all sides share, in memory that stays.

    Attributes:
        caches: of the layers, in turn.
        tables: int32 [rows, blocks of a row]; the block table of all layers.
    """

    def __init__(self, shape: Shape, sizes: Sizes, pool: Pool, device: str) -> None:
        self.shape, self.sizes, self.device = shape, sizes, device
        self.caches = pool.caches(shape)
        blocks = torch.randperm(shape.cache_blocks, device=device).int()
        lengths = {"encoder": 0, "decoder": shape.keys - 1, "this_time": 1}
        self._fields: dict[str, Any] = {
            f"seq_lens_{name}": torch.full((shape.rows,), n, device=device, dtype=torch.int32)
            for name, n in lengths.items()
        }
        self.tables = self._fields["block_tables"] = blocks.view(shape.rows, -1)
        per_layer = [self.caches[n % len(self.caches)] for n in range(LAYERS)]
        self._fields["caches"] = [cache for both in per_layer for cache in both]
        how: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.x = torch.randn(shape.rows, sizes.hidden, **how)
        self.out = torch.empty_like(self.x)
        # cos and sin of every position; all rows are as long, so they are at the same one
        angle = torch.rand(shape.keys, sizes.rope // 2, device=device) * 6
        self.angles = torch.cat([angle.cos(), angle.sin()], 1)
        self.cos_sin = self.angles[-1:].repeat(shape.rows, 1)

    def begin(self, backend: DSAAttentionBackend) -> SimpleNamespace:
        """The metadata of a new step."""
        meta = SimpleNamespace(**self._fields, attn_backend=backend)
        backend.set_step_hints(StepHints(self.shape.rows, 0, self.shape.keys))
        backend.init_attention_metadata(meta)
        return meta


@dataclass(frozen=True)
class OneLayer:
    """What `Work` asks a layer."""

    sizes: Sizes
    weights: Weights
    backend: DSAAttentionBackend

    @staticmethod
    def span(name: str) -> Any:
        """No trace is taken."""
        return nullcontext()


@dataclass(frozen=True)
class Products:
    """What torch makes in a layer, for the package's part of it."""

    kv_a: torch.Tensor
    index_q: torch.Tensor
    latent: torch.Tensor
    rope: torch.Tensor


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
        self._out = backend.projection_buffers(given.shape.rows)
        inputs = given.x, given.cos_sin, given.out
        self._layers = [
            (
                self.work(OneLayer(given.sizes, weights[n % len(weights)], backend), *inputs),
                cache_write(given.sizes, given.device, n, k_norm=True),
            )
            for n in range(LAYERS)
        ]

    def step(self) -> None:
        """One step; the result of the last layer is in `given.out`."""
        meta, overlap = self.given.begin(self.backend), self.backend.overlap
        for work, write in self._layers:
            self.before_layer(meta.fd_dsa_step)
            both = work.layer.weights.wk, work.layer.weights.weights_proj
            work.layer_of(overlap, lambda x, both=both: self._project(x, both), write, meta)

    def before_layer(self, step: ForwardMeta) -> None:
        """Nothing is made for a layer alone."""

    def products(self) -> Products:
        """Those of the first layer."""
        work, _ = self._layers[0]
        qr, kv_a = work.down(work.layer.weights.down)
        return Products(kv_a, qr @ work.layer.weights.wq_b, *work.absorbed(qr))

    def package_alone(self, products: Products, layers: int = LAYERS) -> tuple[torch.Tensor, ...]:
        """A step without what torch makes.

        Returns:
            Slots, queries and attended latents of the last layer, in the backend's buffers.
        """
        meta, found = self.given.begin(self.backend), None
        for work, write in self._layers[:layers]:
            weights = work.layer.weights
            index_k, heads = self._project(self.given.x, (weights.wk, weights.weights_proj))
            work.write(products.kv_a, index_k, write, meta)
            q, folded = work.index_query(products.index_q, heads)
            slots = self.backend.select(q, folded, write.layer_id, meta)
            query = work.query(products.latent, products.rope)
            out = self.backend.attend(query, slots, write.layer_id, meta)
            found = slots, query, out
        assert found is not None
        return found

    def _project(self, x: torch.Tensor, both: Both) -> Both:
        """Index keys and head weights."""
        return triton_kernel.project_indexer(x, *both, self._out)


def slot_chain(step: ForwardMeta) -> torch.Tensor:
    """`slot_mapping` as every layer computed it, from positions and rows."""
    positions = step.position_ids
    blocks = step.block_tables[step.batch_id_per_token, positions // BLOCK]
    return (blocks * BLOCK + positions % BLOCK).to(torch.int64)


class ChainedWork(Work):
    """Slots are computed for each of the two caches."""

    def write(
        self, kv_a: torch.Tensor, index_k: torch.Tensor, write: SimpleNamespace, meta: Any
    ) -> None:
        """Both chains, and our write to the slots of the second."""
        slot_chain(meta.fd_dsa_step)
        slots = slot_chain(meta.fd_dsa_step)
        caches = meta.caches[2 * write.layer_id : 2 * write.layer_id + 2]
        params = write.cache_write_params(None)
        write_caches(kv_a, index_k, None, slots, self.cos_sin, *caches, params)


class Chained(Stack):
    """A: `slot_mapping` twice in every layer, as before FastDeploy #7367."""

    work = ChainedWork


class Scheduled(Chained):
    """B: A, and in every layer the schedule; where the host launches, it waits once a layer.

    FastDeploy's wait is that for the longest window of a step with a prompt. A capture refuses it.
    """

    def before_layer(self, step: ForwardMeta) -> None:
        """Both."""
        self.backend.attention.begin_step(step)
        if not torch.cuda.is_current_stream_capturing():
            step.cache_seqlens.max().item()


class EverythingWork(ChainedWork):
    """What FastDeploy's layers of a decode step do besides."""

    def write(
        self, kv_a: torch.Tensor, index_k: torch.Tensor, write: SimpleNamespace, meta: Any
    ) -> None:
        """A scale that nothing reads, and a new selection filled with -1."""
        _ = kv_a[:, :RANK].abs().max() / 200
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
        slots, query, out: of the layer: int32 [rows, topk], bfloat16 [rows, heads, 576] and
            [rows, heads, 512].
        queries: e4m3 codes [rows, index_heads, 128] and float32 [rows, index_heads].

    Returns:
        `recall`, the least share of the best keys that was chosen, and `attention`, the relative
        error of the attended latents over the slots that were chosen.
    """
    (latents, index), rows = given.caches[0], given.shape.rows
    scale = given.sizes.scale
    tables, recall, off, size = given.tables, 1.0, 0.0, 0.0
    for token in sorted({0, rows // 2, rows - 1}):
        keys, scales = _logits_sides.keys_of(index, tables[token])
        codes = queries[0][token].view(torch.float8_e4m3fn).double()
        dots = (codes @ keys.double().T).relu_()
        scores = (queries[1][token].double() @ dots) * scales.double()
        best = scores.topk(min(given.sizes.topk, len(scores))).indices
        wanted = tables[token][best // BLOCK] * BLOCK + best % BLOCK
        recall = min(recall, float(torch.isin(wanted, slots[token]).double().mean()))
        chosen = slots[token][slots[token] >= 0].long()
        rows_of = _sparse_mla_sides.latents_of(latents.view(-1, LATENT_BYTES)[chosen])
        weights = torch.softmax(query[token].double() @ rows_of.T * scale, dim=1)
        exact = weights @ rows_of[:, :RANK]
        off += float((out[token].double() - exact).square().sum())
        size += float(exact.square().sum())
    return {"recall": recall, "attention": (off / size) ** 0.5}


def weights_of(sizes: Sizes, device: str) -> list[Weights]:
    """Weights of as many layers as exceed the L2 together."""
    first = Weights(sizes, device)
    return [first, *(Weights(sizes, device) for _ in range(_gpu.num_sets(first.num_bytes()) - 1))]


def backend_of(sizes: Sizes, device: str) -> DSAAttentionBackend:
    """Serves rows of `sizes.context` keys."""
    config = config_of(sizes, sizes.max_rows * sizes.context // BLOCK)
    return DSAAttentionBackend(config, "gpu", allocator(device))
