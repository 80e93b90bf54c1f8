"""A layer of DeepSeek-V3.2 without its experts on torch tensors: projections and DSA, one rank.

Projections are bfloat16 GEMMs of torch, QKV-A in block FP8 where that is asked for. All else is the
package's backend, as in a server: the write of both caches, the indexer with its selection, the
query and sparse MLA over fp8_ds_mla caches. A layer reads 400 MB of weights, so that nothing it
needs is left in the L2 by the run before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import _gpu
from benchmarks._fp8_linear import Fp8Linear
from benchmarks._logits_sides import Shape, random_cache
from benchmarks._sparse_mla_sides import record_cache
from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig, StepHints
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.cache_formats import INDEX_RECORD_BYTES, LATENT_RECORD_BYTES
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.ops.mla_query import prepare_mla_query
from fd_dsa.ops.query_kernels import prepare_indexer_query

LAYERS, BLOCK = 61, 64
Both = tuple[torch.Tensor, torch.Tensor]
Project = Callable[[torch.Tensor], Both]
# a weight [in, out], or a layer that multiplies by one in another format
Linear = torch.Tensor | Fp8Linear


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of a server's steps; the defaults are those of V3.2."""

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


def layer_bytes(shape: Shape, sizes: Sizes, weight_bytes: int) -> int:
    """Fewest bytes that a layer reads: weights, all index keys, the selected latents."""
    latents = min(shape.num_tokens * min(sizes.topk, shape.keys), shape.rows * shape.keys)
    index = INDEX_RECORD_BYTES * shape.rows * shape.keys
    return weight_bytes + index + LATENT_RECORD_BYTES * latents


def layer_flops(shape: Shape, sizes: Sizes, weight_bytes: int) -> int:
    """Operations of a layer in bfloat16: projections and attention, scores left out."""
    attention = sizes.heads * min(sizes.topk, shape.keys) * (2 * sizes.rank + sizes.rope)
    return 2 * shape.num_tokens * (weight_bytes // 2 + attention)


def floor_us(shape: Shape, sizes: Sizes, weight_bytes: int, ceilings: Mapping[str, float]) -> float:
    """Least microseconds of a layer: of the bytes or of the GEMMs, whichever takes longer.

    Args:
        shape: of the step.
        sizes: of the model.
        weight_bytes: of a layer.
        ceilings: `copy_bytes_per_s` and `matrix_flops_per_s`, as measured.
    """
    read_s = layer_bytes(shape, sizes, weight_bytes) / ceilings["copy_bytes_per_s"]
    gemms_s = layer_flops(shape, sizes, weight_bytes) / ceilings["matrix_flops_per_s"]
    return max(read_s, gemms_s) * 1e6


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


def weights_of(sizes: Sizes, device: str) -> list[Weights]:
    """Weights of as many layers as exceed the L2 together."""
    first = Weights(sizes, device)
    return [first, *(Weights(sizes, device) for _ in range(_gpu.num_sets(first.num_bytes()) - 1))]


def backend_of(sizes: Sizes, device: str) -> DSAAttentionBackend:
    """Serves `sizes.max_rows` rows of `sizes.context` keys."""
    s, columns = sizes, sizes.context // BLOCK
    layout = CacheLayout("fp8_ds_mla", BLOCK, s.rank, s.rope, s.index_dim)
    config = DSABackendConfig(
        *(s.heads, s.index_heads, s.topk, s.scale, layout, s.max_rows, s.max_tokens, columns),
        s.max_rows * columns,
        dtype="bfloat16",
    )
    return DSAAttentionBackend(
        config,
        "gpu",
        lambda shape, dtype: torch.empty(shape, device=device, dtype=getattr(torch, dtype)),
    )


def cache_write(sizes: Sizes, device: str, layer_id: int, *, k_norm: bool = True) -> Any:
    """What `write_caches` asks a layer; without `k_norm` index keys come normed."""
    norms = {"kv_norm_weight": torch.ones(sizes.rank, device=device)}
    if k_norm:
        ones = torch.ones(sizes.index_dim, device=device)
        norms |= {"k_norm_weight": ones, "k_norm_bias": 0 * ones}
    params = CacheWriteParams("fp8_ds_mla", **norms)
    return SimpleNamespace(layer_id=layer_id, cache_write_params=lambda layout: params)


class Pool:
    """Random caches of both kinds, of which layers take parts."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._latents = record_cache(num_blocks * BLOCK).view(-1, 1, BLOCK, LATENT_RECORD_BYTES)
        self._index = random_cache(num_blocks)

    def caches(self, size: int) -> list[Both]:
        """Latents and index keys in `size` blocks, of as many layers as there is room for."""
        starts = [n * size for n in range(min(LAYERS, self.num_blocks // size))]
        return [(self._latents[n : n + size], self._index[n : n + size]) for n in starts]


class Given:
    """Inputs of a step of many layers that all sides share, in memory that stays.

    Attributes:
        x: bfloat16 [num_tokens, hidden]; hidden states of every layer.
        out: like x; the result of the last layer that ran.
        caches: of the layers, in turn.
        tables: int32 [rows, blocks of a row]; the block table of all layers.
        angles, cos_sin: float32 [keys, rope] and [num_tokens, rope]; cos, then sin, of every
            position and of the tokens.
    """

    def __init__(self, shape: Shape, sizes: Sizes, pool: Pool, device: str) -> None:
        self.shape, self.sizes, self.device = shape, sizes, device
        self.caches = pool.caches(shape.num_pages)
        is_prompt, new = shape.is_prompt, shape.new
        lengths = {"encoder": new * is_prompt, "decoder": shape.keys - new, "this_time": new}
        self._fields: dict[str, Any] = {
            f"seq_lens_{name}": torch.full((shape.rows,), n, device=device, dtype=torch.int32)
            for name, n in lengths.items()
        }
        blocks = torch.randperm(shape.num_pages, device=device).int()
        self.tables = self._fields["block_tables"] = blocks.view(shape.rows, -1)
        self._fields["caches"] = [x for n in range(LAYERS) for x in self.caches_of(n)]
        self._hints = StepHints(shape.num_tokens, shape.num_tokens * is_prompt, shape.keys)
        how: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.x = torch.randn(shape.num_tokens, sizes.hidden, **how)
        self.out = torch.empty_like(self.x)
        # all rows are as long, so their tokens are at the same positions
        angle = torch.rand(shape.keys, sizes.rope // 2, device=device) * 6
        self.angles = torch.cat([angle.cos(), angle.sin()], 1)
        self.cos_sin = self.angles[-new:].repeat(shape.rows, 1)

    def caches_of(self, layer_id: int) -> Both:
        """Latents and index keys of a layer."""
        return self.caches[layer_id % len(self.caches)]

    def begin(self, backend: DSAAttentionBackend) -> SimpleNamespace:
        """The metadata of a new step, which the backend holds until the next one."""
        meta = SimpleNamespace(**self._fields, attn_backend=backend)
        backend.set_step_hints(self._hints)
        backend.init_attention_metadata(meta)
        return meta


@dataclass(frozen=True)
class Layer:
    """What a layer consists of."""

    sizes: Sizes
    weights: Weights
    backend: DSAAttentionBackend


class Work:
    """What a layer computes for the tokens of a step."""

    def __init__(self, layer: Layer, given: Given) -> None:
        self.layer, self.given, self.num_tokens = layer, given, given.shape.num_tokens

    def run(
        self, overlap: IndexerOverlap, project: Project, write: Any, meta: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The layer; its result is in `given.out`.

        Args:
            overlap: forks `project`, or runs it in line.
            project: index keys and head weights of the hidden states.
            write: of `cache_write`.
            meta: of the step, whose metadata the backend holds.

        Returns:
            Slots int32 [num_tokens, topk], absorbed queries bfloat16 [num_tokens, heads, 576] and
            attended latents [num_tokens, heads, 512].
        """
        work = partial(self.down, self.layer.weights.down)
        (qr, kv_a), (index_k, weights) = overlap.run(self.num_tokens, work, project, self.given.x)
        self.write(kv_a, index_k, write, meta)
        slots = self.select(*self.index_query(self.index_heads(qr), weights), write.layer_id, meta)
        query = self.query(*self.absorbed(qr))
        latent = self.attend(query, slots, write.layer_id, meta)
        self.project_out(latent)
        return slots, query, latent

    def down(self, weight: Linear) -> Both:
        """Normed latents of the queries, and keys as projected."""
        x, rank = self.given.x, self.layer.sizes.q_rank
        qkv = weight(x) if isinstance(weight, Fp8Linear) else x @ weight
        normed = torch.nn.functional.rms_norm(qkv[:, :rank], (rank,), self.layer.weights.q_norm)
        return normed, qkv[:, rank:]

    def write(self, kv_a: torch.Tensor, index_k: torch.Tensor, write: Any, meta: Any) -> None:
        """The step's keys into both caches."""
        self.layer.backend.write(kv_a, index_k, self.given.cos_sin, write, meta)

    def index_heads(self, qr: torch.Tensor) -> torch.Tensor:
        """Queries of the indexer, [num_tokens, index_heads, index_dim]."""
        s = self.layer.sizes
        return (qr @ self.layer.weights.wq_b).view(-1, s.index_heads, s.index_dim)

    def index_query(self, q: torch.Tensor, weights: torch.Tensor) -> Both:
        """Queries of the indexer as it scores with them, and their weights."""
        s = self.layer.sizes
        return prepare_indexer_query(
            q,
            weights,
            None,
            self.given.cos_sin,
            rope_interleave=False,
            quantized=True,
            weights_scale=s.index_heads**-0.5 * s.index_dim**-0.5,
            out=self.layer.backend.attention.query_buffers(self.num_tokens),
        )

    def select(self, q: torch.Tensor, weights: torch.Tensor, layer_id: int, meta: Any) -> Any:
        """Slots of the best keys."""
        return self.layer.backend.select(q, weights, layer_id, meta)

    def absorbed(self, qr: torch.Tensor) -> Both:
        """Absorbed queries [num_tokens, heads, rank], and what of them is rotated."""
        s, weights = self.layer.sizes, self.layer.weights
        q = (qr @ weights.q_b).view(-1, s.heads, s.nope + s.rope)
        latent = torch.bmm(q[:, :, : s.nope].transpose(0, 1), weights.k_b)
        return latent.transpose(0, 1), q[:, :, s.nope :]

    def query(self, latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """Both parts side by side, the second rotated."""
        buffer = self.layer.backend.attention.mla_query_buffer(self.num_tokens)
        return prepare_mla_query(latent, rope, None, self.given.cos_sin, out=buffer)

    def attend(self, query: torch.Tensor, slots: torch.Tensor, layer_id: int, meta: Any) -> Any:
        """Attended latents."""
        return self.layer.backend.attend(query, slots, layer_id, meta)

    def project_out(self, latent: torch.Tensor) -> None:
        """The layer's result from the attended latents."""
        weights = self.layer.weights
        merged = torch.bmm(latent.transpose(0, 1), weights.v_b).transpose(0, 1)
        torch.mm(merged.reshape(self.num_tokens, -1), weights.out, out=self.given.out)
