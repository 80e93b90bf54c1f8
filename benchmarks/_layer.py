"""A layer of DeepSeek-V3.2 without its experts on torch tensors: projections and DSA, one rank.

Projections are bfloat16 GEMMs of torch, QKV-A in block FP8 where that is asked for. All else is the
package's backend, as in a server: the write of both caches, the indexer with its selection, the
query and sparse MLA over fp8_ds_mla caches. A layer reads 400 MB of weights, so that nothing it
needs is left in the L2 by the run before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks._fp8_linear import Fp8Linear
from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig, StepHints
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.ops.mla_query import prepare_mla_query
from fd_dsa.ops.unchecked import prepare_indexer_query
from fd_dsa.step.device import Allocate

BLOCK = 64
Both = tuple[torch.Tensor, torch.Tensor]
Project = Callable[[torch.Tensor], Both]
# a weight [in, out], or a layer that multiplies by one in another format
Linear = torch.Tensor | Fp8Linear


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of the steps; the defaults are those of V3.2."""

    hidden: int = 7168
    q_rank: int = 1536
    rank: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128
    heads: int = 128
    index_heads: int = 64
    index_dim: int = 128
    topk: int = 2048
    context: int = 4096
    max_rows: int = 128
    max_tokens: int = 2048

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return (self.nope + self.rope) ** -0.5


class Weights:
    """Weights of the projections, as [in, out]; of the heads' own, [heads, in, out].

    Attributes:
        indexer_in_fp8: `wk` and `weights_proj` in block FP8, of a layer that has QKV-A in it.
    """

    indexer_in_fp8: tuple[Fp8Linear, Fp8Linear]

    def __init__(self, sizes: Sizes, device: str) -> None:
        s, self._device = sizes, device
        self.down: Linear = self._random(s.hidden, s.q_rank + s.rank + s.rope)
        self.indexer = self._random(s.hidden, s.index_dim + s.index_heads)
        self.wk, self.weights_proj = self.indexer.split([s.index_dim, s.index_heads], 1)
        self.wq_b = self._random(s.q_rank, s.index_heads * s.index_dim)
        self.q_b = self._random(s.q_rank, s.heads * (s.nope + s.rope))
        self.k_b = self._random(s.heads, s.nope, s.rank)
        self.v_b = self._random(s.heads, s.rank, s.value)
        self.out = self._random(s.heads * s.value, s.hidden)
        self.q_norm = torch.ones(s.q_rank, device=device, dtype=torch.bfloat16)
        self.k_norm = torch.ones(s.index_dim, device=device, dtype=torch.bfloat16)
        self.k_bias = torch.zeros(s.index_dim, device=device, dtype=torch.bfloat16)

    def _random(self, *shape: int) -> torch.Tensor:
        random = torch.randn(shape, device=self._device, dtype=torch.bfloat16)
        return random * shape[-2] ** -0.5

    def num_bytes(self) -> int:
        """Bytes that a step reads of them."""
        matrices = self.down, self.indexer, self.wq_b, self.q_b, self.k_b, self.v_b, self.out
        return sum(matrix.nbytes for matrix in matrices)


class Layer:
    """One layer, its caches and its backend.

    Attributes:
        latent, index: caches in fp8_ds_mla of `max_rows` rows of `context` tokens.
        span: names a part of the work while a trace is taken; else does nothing.
    """

    def __init__(self, sizes: Sizes, device: str = "cuda") -> None:
        self.sizes, self.weights, self._device = sizes, Weights(sizes, device), device
        s, blocks = sizes, sizes.max_rows * sizes.context // BLOCK
        self.latent, self.index = _caches(layout_of(s), blocks, device)
        self.backend = DSAAttentionBackend(config_of(s, blocks), "gpu", allocator(device))
        self.out = torch.empty(s.max_tokens, s.hidden, device=device, dtype=torch.bfloat16)
        self.span: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()


def layout_of(sizes: Sizes) -> CacheLayout:
    """The format of the caches."""
    return CacheLayout("fp8_ds_mla", BLOCK, sizes.rank, sizes.rope, sizes.index_dim)


def config_of(sizes: Sizes, blocks: int) -> DSABackendConfig:
    """What a backend is made for whose caches have so many blocks."""
    s = sizes
    return DSABackendConfig(
        s.heads,
        s.index_heads,
        s.topk,
        s.scale,
        layout_of(s),
        s.max_rows,
        s.max_tokens,
        s.context // BLOCK,
        blocks,
        dtype="bfloat16",
    )


def allocator(device: str) -> Allocate:
    """Makes uninitialised tensors."""
    return lambda shape, dtype: torch.empty(shape, device=device, dtype=getattr(torch, dtype))


def cache_write(sizes: Sizes, device: str, layer_id: int, *, k_norm: bool) -> SimpleNamespace:
    """What `write_caches` asks a layer; without `k_norm` index keys come normed."""
    norms = {"kv_norm_weight": torch.ones(sizes.rank, device=device)}
    if k_norm:
        ones = torch.ones(sizes.index_dim, device=device)
        norms |= {"k_norm_weight": ones, "k_norm_bias": 0 * ones}
    params = CacheWriteParams("fp8_ds_mla", **norms)
    return SimpleNamespace(layer_id=layer_id, cache_write_params=lambda layout: params)


class Work:
    """What a layer computes for the tokens of a step.

    Args:
        layer: a Layer, or anything with its `sizes`, `weights`, `backend` and `span`.
        x: bfloat16 [num_tokens, hidden]; hidden states.
        cos_sin: float32 [num_tokens, rope]; cos, then sin.
        out: bfloat16 [num_tokens, hidden]; the result.
    """

    def __init__(
        self, layer: Any, x: torch.Tensor, cos_sin: torch.Tensor, out: torch.Tensor
    ) -> None:
        self.layer, self.num_tokens = layer, len(x)
        self.x, self.cos_sin, self.out = x, cos_sin, out

    def down(self, weight: Linear) -> Both:
        """Normed latents of the queries, and keys as projected."""
        layer, rank = self.layer, self.layer.sizes.q_rank
        with layer.span("QKV-A"):
            qkv = weight(self.x) if isinstance(weight, Fp8Linear) else self.x @ weight
        with layer.span("norm"):
            normed = torch.nn.functional.rms_norm(qkv[:, :rank], (rank,), layer.weights.q_norm)
        return normed, qkv[:, rank:]

    def layer_of(
        self, overlap: IndexerOverlap, project: Project, write: SimpleNamespace, meta: Any
    ) -> None:
        """The layer; the result is in `out`.

        Args:
            overlap: forks `project`, or runs it in line.
            project: index keys and head weights of the hidden states.
            write: of `cache_write`.
            meta: of the step, whose metadata the backend holds.
        """
        layer = self.layer
        with overlap.fork(self.num_tokens, project, self.x) as side:
            qr, kv_a = self.down(layer.weights.down)
            index_k, weights = side.join()
        with layer.span("cache write"):
            self.write(kv_a, index_k, write, meta)
        with layer.span("indexer query"):
            q, folded = self.index_query(qr @ layer.weights.wq_b, weights)
        with layer.span("scores and top-k"):
            slots = layer.backend.select(q, folded, write.layer_id, meta)
        with layer.span("query"):
            query = self.query(*self.absorbed(qr))
        with layer.span("sparse MLA"):
            latent = layer.backend.attend(query, slots, write.layer_id, meta)
        with layer.span("output"):
            self.project_out(latent)

    def write(
        self, kv_a: torch.Tensor, index_k: torch.Tensor, write: SimpleNamespace, meta: Any
    ) -> None:
        """The step's keys into both caches."""
        self.layer.backend.write(kv_a, index_k, self.cos_sin, write, meta)

    def index_query(self, q: torch.Tensor, weights: torch.Tensor) -> Both:
        """Queries of the indexer as it scores with them, and their weights."""
        s = self.layer.sizes
        return prepare_indexer_query(
            q.view(-1, s.index_heads, s.index_dim),
            weights,
            None,
            self.cos_sin,
            rope_interleave=False,
            quantized=True,
            weights_scale=s.index_heads**-0.5 * s.index_dim**-0.5,
            out=self.layer.backend.query_buffers(self.num_tokens),
        )

    def absorbed(self, qr: torch.Tensor) -> Both:
        """Absorbed queries [num_tokens, heads, rank], and what of them is rotated."""
        s, weights = self.layer.sizes, self.layer.weights
        q = (qr @ weights.q_b).view(-1, s.heads, s.nope + s.rope)
        latent = torch.bmm(q[:, :, : s.nope].transpose(0, 1), weights.k_b)
        return latent.transpose(0, 1), q[:, :, s.nope :]

    def query(self, latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """Both parts side by side, the second rotated."""
        buffer = self.layer.backend.mla_query_buffer(self.num_tokens)
        return prepare_mla_query(latent, rope, None, self.cos_sin, out=buffer)

    def project_out(self, latent: torch.Tensor) -> None:
        """The layer's result from the attended latents."""
        weights = self.layer.weights
        merged = torch.bmm(latent.transpose(0, 1), weights.v_b).transpose(0, 1)
        torch.mm(merged.reshape(self.num_tokens, -1), weights.out, out=self.out)


class Step(Work):
    """One step of a layer: its inputs, and the metadata that the backend has made of it.

    Up to `max_rows` tokens are decode rows of the full context; more are a prompt's last chunk.
    The backend holds one step, so a new one ends the one before.
    """

    def __init__(self, layer: Layer, num_tokens: int) -> None:
        s, device = layer.sizes, layer._device
        is_prefill = num_tokens > s.max_rows
        rows = 1 if is_prefill else num_tokens
        new = num_tokens // rows
        columns = s.context // BLOCK
        blocks = torch.randperm(layer.latent.shape[0], device=device)[: rows * columns]

        def each_row(value: int) -> torch.Tensor:
            return torch.full((rows,), value, device=device, dtype=torch.int32)

        self.meta = SimpleNamespace(
            seq_lens_encoder=each_row(new if is_prefill else 0),
            seq_lens_decoder=each_row(s.context - new),
            seq_lens_this_time=each_row(new),
            block_tables=blocks.reshape(rows, columns).int(),
            caches=[layer.latent, layer.index] * 2,
            attn_backend=layer.backend,
        )
        hints = StepHints(num_tokens, num_tokens if is_prefill else 0, s.context)
        layer.backend.set_step_hints(hints)
        layer.backend.init_attention_metadata(self.meta)
        angle = torch.rand(num_tokens, s.rope // 2, device=device) * 6
        x = torch.randn(num_tokens, s.hidden, device=device, dtype=torch.bfloat16)
        super().__init__(layer, x, torch.cat([angle.cos(), angle.sin()], 1), layer.out[:num_tokens])
        # index keys that `write_caches` norms, and those that come normed
        self._writes = {
            k_norm: cache_write(s, device, layer_id, k_norm=k_norm)
            for layer_id, k_norm in enumerate((True, False))
        }

    def run(self, overlap: IndexerOverlap, project: Project, *, k_norm: bool = True) -> None:
        """The layer; the result is in `out`.

        Args:
            overlap, project: as of `layer_of`.
            k_norm: index keys are normed by the write.
        """
        self.layer_of(overlap, project, self._writes[k_norm], self.meta)

    def floor_s(self, ceilings: Mapping[str, float]) -> float:
        """Least seconds of the layer, by the bytes that it reads or by its multiplications.

        Args:
            ceilings: `copy_bytes_per_s` and `matrix_flops_per_s`, as measured.
        """
        s, rows = self.layer.sizes, self.meta.seq_lens_this_time.shape[0]
        weights = self.layer.weights.num_bytes()
        latents = min(self.num_tokens * s.topk, rows * s.context)
        read = weights + 132 * rows * s.context + 656 * latents
        attention = s.heads * s.topk * (2 * s.rank + s.rope) + s.index_heads * 128 * s.context
        products = 2 * self.num_tokens * (weights / 2 + attention)
        return max(read / ceilings["copy_bytes_per_s"], products / ceilings["matrix_flops_per_s"])


def _caches(layout: CacheLayout, blocks: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches of random keys: no code is NaN, scales keep values near 1."""

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 0x58, shape, device=device, dtype=torch.uint8)

    def scales(*shape: int) -> torch.Tensor:
        return torch.full(shape, 2.0**-4, device=device).view(torch.uint8)

    rows = blocks, 1, BLOCK
    rope = torch.randn(*rows, layout.qk_rope_head_dim, device=device, dtype=torch.bfloat16)
    parts = codes(*rows, layout.kv_lora_rank), scales(*rows, 4), rope.view(torch.uint8)
    latent = torch.cat(parts, 3)
    planes = codes(blocks, BLOCK * layout.index_head_dim), scales(blocks, BLOCK)
    return latent, torch.cat(planes, 1).view(blocks, BLOCK, layout.index_head_dim + 4)
