"""Selection and attention on a device: launches over pages, with buffers that never move.

One launch serves the tokens of prompts and of decode rows: a prompt token sees the keys of its
window in `indexer_attn_mask_offsets`, a decode token those up to its position. Grids and views
follow from the counts that the host knows, so the host reads no tensor back and, once the views of
a size exist, allocates nothing.

Which of our kernels serve is decided when the attention is made (`fd_dsa.ops.providers`): the
fastest that take its sizes and types.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING

from fd_dsa import custom_ops
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.device_scores import (
    PageScores,
    Sizes,
    TileScores,
    rounded_length,
    tile_sizes,
)
from fd_dsa.attention.indexer import Indexer
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.attention.protocol import HostLengths, MlaLayer
from fd_dsa.attention.tensor_core_attention import TensorCoreAttention
from fd_dsa.device.allocation import CACHED_VIEWS, Allocate
from fd_dsa.device.transfers import transfers_for
from fd_dsa.errors import KernelUnavailable
from fd_dsa.ops.arrays import check_shape
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.ops.cache_write.triton_kernel import write_caches
from fd_dsa.ops.linear import values_of
from fd_dsa.ops.logits import tile_forms
from fd_dsa.ops.mla import tensor_core
from fd_dsa.ops.mla.custom_op import choose_attention, kind_for
from fd_dsa.ops.mla.triton_kernel import attend_slots
from fd_dsa.ops.mla_query.triton_kernel import prepare_mla_query
from fd_dsa.ops.providers import (
    CUSTOM_OP,
    TENSOR_CORE,
    TRITON,
    choose,
    device_kind,
    is_refused,
    refuse,
    settle,
)
from fd_dsa.ops.query.triton_kernel import prepare_indexer_query
from fd_dsa.ops.topk.custom_op import slot_selector
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.device_api import traits_for
from fd_dsa.triton_runtime.driver import GpuTraits

if TYPE_CHECKING:
    from fd_dsa.attention.dense_prompts import DensePrompts

logger = logging.getLogger(__name__)
LOGITS_BYTES = 512 << 20
"""Most memory for the scores of a layer, but at least one token's are held; the tokens of a longer
step are scored in chunks."""

_WIDTHS = {"float32": 4, "bfloat16": 2, "int32": 4, "uint8": 1}
Buffers = dict[str, tuple[Tensor, tuple[int, ...]]]
"""Memory, and the shape of each value."""
Projected = tuple[Tensor, Tensor, Tensor, Tensor]
"""Latents of queries and keys, index keys and head weights of a layer."""


class DeviceAttention:
    """Writer and reader of the caches, with buffers for every layer and step.

    Args:
        allocate: makes a contiguous tensor of a shape and dtype on the device.

    Attributes:
        dense_prompts: attends for prompts within `index_topk`; None: in the absorbed form, as for
            all others.
        scores: kernels that score and select keys; replaced if a kernel cannot be compiled.
        tensor_core_attention: attention on tensor cores; None if `attend_slots` serves.
    """

    def __init__(self, config: DSABackendConfig, allocate: Allocate) -> None:
        self.config, self._allocate = config, allocate
        self._query_format = config.query_format
        self._buffers: Buffers = {}
        self._take(_sizes(config))
        self._view = lru_cache(maxsize=CACHED_VIEWS)(partial(buffer_view, self._buffers))
        # the layer that made it, as the address of its cache, and the slots
        self._everything: tuple[int, Tensor] | None = None
        kind = device_kind(self._buffers["logits"][0])
        # the interpreter's tensors are in host memory
        kind = "interpreter" if kind == "cpu" else kind
        settle(kind)
        self._kind = kind
        self.scores = self._new_scores()
        self.tensor_core_attention = self._new_attention()
        self.dense_prompts: DensePrompts | None = None
        if config.head_widths is not None:
            # it works on Paddle's tensors alone
            from fd_dsa.attention.dense_prompts import dense_prompts_for

            traits = traits_for(self._buffers["logits"][0])
            self.dense_prompts = dense_prompts_for(config, allocate, traits)

    def _take(self, sizes: Sizes) -> None:
        for name, (count, shape, dtype) in sizes.items():
            self._buffers[name] = self._allocate((count * prod(shape),), dtype), shape

    def _new_scores(self) -> PageScores:
        """Return the selected kernels that score and select on this kind of device."""
        kind = self._kind
        config, logits = self.config, self._buffers["logits"][0]
        made = config, self._view, int(logits.shape[0]), slot_selector(kind, self._allocate)
        conditions = {TENSOR_CORE: why_not_tiles(config)}
        if choose("indexer_logits", kind, conditions).provider == TRITON:
            return PageScores(*made)
        transfers = transfers_for(logits)
        self._take(tile_sizes(config, made[2], transfers.traits.num_processors))
        return TileScores(*made, transfers)

    def _new_attention(self) -> TensorCoreAttention | None:
        """Return the attention on tensor cores, or None if `attend_slots` is selected."""
        kind = self._kind
        config, logits = self.config, self._buffers["logits"][0]
        heads, types = config.num_heads, kernel_types(config)
        capability = traits_for(logits).capability
        choice = choose_attention(kind, heads, *types, capability, self._allocate)
        if choice.provider == TRITON:
            return None
        own = None
        if choice.provider == CUSTOM_OP:
            own = kind_for(heads, config.cache_layout.is_fp8)
        custom = own(custom_ops.build().kernels) if own else None
        # scores of a layer are done with when its tokens attend
        always = is_refused("sparse_mla", kind, TENSOR_CORE)
        return TensorCoreAttention(config, self._allocate, logits, custom, always)

    def _score(self, call: Callable[[PageScores], None]) -> None:
        """Call with the scores, once more with the next provider after a failed compilation.

        Raises:
            KernelUnavailable: no other provider may serve, or a captured graph reads the schedule
                of this one.
        """
        try:
            call(self.scores)
        except KernelUnavailable as error:
            if type(self.scores) is PageScores or self.scores.is_captured:
                raise
            refuse("indexer_logits", self._kind, TENSOR_CORE, error)
            self.scores = self._new_scores()
            call(self.scores)

    def begin_step(
        self,
        step: ForwardMeta | None = None,
        lengths: HostLengths | None = None,
    ) -> None:
        """Reset what the layers of a step share, and prepare it for `step`.

        Also called before the replay of layers that were captured without it.

        Args:
            step: next step; None after the last one.
            lengths: lengths of its rows, if the host knows them.
        """
        self._everything = None
        if self.dense_prompts is not None:
            self.dense_prompts.begin_step(step, lengths)
        if step is None:
            return
        if step.max_seqlen_k > self.config.index_topk or self.scores.is_captured:
            self._score(lambda scores: scores.prepare(step))

    def query_buffers(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the buffers of the two results of `prepare_indexer_query`."""
        return self._view("index_q", num_tokens), self._view("index_weights", num_tokens)

    def projection_buffers(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the buffers of `project_indexer`: index keys and head weights."""
        return self._view("index_k", num_tokens), self._view("head_weights", num_tokens)

    def mla_query_buffer(self, num_tokens: int) -> Tensor:
        """Return the buffer that `prepare_mla_query` writes and `attend` reads."""
        return self._view("mla_q", num_tokens)

    def allocate_cache(self, shape: list[int]) -> Tensor:
        """Allocate a cache with arbitrary contents: only written values are read."""
        layout = self.config.cache_layout
        return self._allocate(tuple(shape), layout.format.device_dtype)

    def project(
        self, layer: MlaLayer, indexer: Indexer, hidden: Tensor, overlap: IndexerOverlap
    ) -> Projected:
        """Project a layer's input, for the indexer on a second stream."""
        # the indexer's projections are never FP8
        values, num_tokens = values_of(hidden), hidden.shape[0]
        out = self.projection_buffers(num_tokens)
        forked = num_tokens if indexer.may_fork(values) else 0
        work = partial(layer.project_qkv_a, hidden)
        (latent, kv_a, joined), (index_k, weights) = overlap.run(
            forked, work, indexer.project, values, out
        )
        return latent, kv_a, index_k if joined is None else joined, weights

    def write(
        self,
        step: ForwardMeta,
        kv_a: Tensor,
        index_k: Tensor | None,
        cos_sin: Tensor,
        latent_cache: Tensor,
        index_cache: Tensor | None,
        params: CacheWriteParams,
    ) -> None:
        """See DSAAttentionBackend.write."""
        slots = step.slot_mapping
        write_caches(kv_a, index_k, None, slots, cos_sin, latent_cache, index_cache, params)

    def prepare_indexer_query(
        self, q: Tensor, weights: Tensor, cos_sin: Tensor, rope_interleave: bool
    ) -> tuple[Tensor, Tensor]:
        """Bring queries of an indexer into the format of its keys, by `indexer_query`."""
        out = self.query_buffers(q.shape[0])
        how = {"rope_interleave": rope_interleave, **self._query_format}
        return prepare_indexer_query(q, weights, None, cos_sin, out=out, **how)

    def prepare_mla_query(
        self, q_latent: Tensor, q_pe: Tensor, position_ids: Tensor | None, cos_sin: Tensor
    ) -> Tensor:
        """Run the operator of the same arguments, with the result in `mla_query_buffer`."""
        out = self.mla_query_buffer(q_latent.shape[0])
        return prepare_mla_query(q_latent, q_pe, position_ids, cos_sin, out)

    def select(self, step: ForwardMeta, q: Tensor, weights: Tensor, cache: Tensor) -> Tensor:
        """See DSAAttentionBackend.select. The cache is the layer's indexer cache.

        If no row is longer than `index_topk`, every token sees all of its keys: scores are not
        needed, and the layers of the step share one selection.
        """
        if step.max_seqlen_k <= self.config.index_topk:
            layer = cache.data_ptr()
            # the same layer again: a capture after a warm-up, whose graph needs the launch too
            if self._everything is None or self._everything[0] == layer:
                self._everything = layer, self._all_keys(step, cache)
            return self._everything[1]
        slots = self._view("slots", step.position_ids.shape[0], self.config.index_topk)
        self._score(lambda scores: scores.select(step, q, weights, cache, slots))
        return slots

    def attend(self, step: ForwardMeta, q: Tensor, cache: Tensor, selection: Tensor) -> Tensor:
        """See DSAAttentionBackend.attend. The cache is the layer's latent cache."""
        num_tokens = q.shape[0]
        if len(selection.shape) == 3:
            selection = selection.reshape([selection.shape[0], -1])
        prompts = self.dense_prompts
        if prompts is not None and prompts.other_step is not None:
            step, selection = prompts.other_step, prompts.of_others(selection)
        check_shape("attend", "selection", selection, (num_tokens, None))
        out = self._view("latents", num_tokens)
        try:
            self._attend(step, q, cache, selection, out)
        except KernelUnavailable as error:
            if self.tensor_core_attention is None:
                raise
            refuse("sparse_mla", self._kind, TENSOR_CORE, error)
            self.tensor_core_attention = self._new_attention()
            self._attend(step, q, cache, selection, out)
        return out

    def _attend(
        self, step: ForwardMeta, q: Tensor, cache: Tensor, selection: Tensor, out: Tensor
    ) -> None:
        """Fill `out` by the selected kernel."""
        if self.tensor_core_attention is None:
            scale, rank = self.config.softmax_scale, self.config.cache_layout.kv_lora_rank
            attend_slots(q, cache, selection, out, softmax_scale=scale, kv_lora_rank=rank)
        else:
            self.tensor_core_attention.attend(q, cache, selection, out, step=step)

    def _all_keys(self, step: ForwardMeta, cache: Tensor) -> Tensor:
        """Return the selection of a step whose tokens see all of their keys."""
        num_tokens = step.position_ids.shape[0]
        width = rounded_length(step.max_seqlen_k, self.config.index_topk)
        slots = self._view("slots", num_tokens, width)
        self.scores.choose(step, self._view("logits", 1, 1), cache, slots, num_rows=num_tokens)
        return slots


def _sizes(config: DSABackendConfig) -> Sizes:
    """Return the sizes of the buffers of a DeviceAttention, without its schedules."""
    layout, tokens = config.cache_layout, config.max_num_tokens
    heads, index_heads, rank = config.num_heads, config.index_n_heads, layout.kv_lora_rank
    max_keys = config.max_blocks_per_seq * layout.block_size
    num_logits = min(max(LOGITS_BYTES // 4, max_keys), tokens * max_keys)
    codes = "uint8" if layout.is_fp8 else config.dtype
    return {
        "logits": (num_logits, (), "float32"),
        "slots": (tokens * config.index_topk, (), "int32"),
        "mla_q": (tokens, (heads, rank + layout.qk_rope_head_dim), config.dtype),
        "latents": (tokens, (heads, rank), config.dtype),
        "index_q": (tokens, (index_heads, layout.index_head_dim), codes),
        "index_weights": (tokens, (index_heads,), "float32"),
        "index_k": (tokens, (layout.index_head_dim,), config.dtype),
        "head_weights": (tokens, (index_heads,), "float32"),
    }


def workspace_bytes(config: DSABackendConfig, gpu: GpuTraits) -> int:
    """Return the bytes that a DeviceAttention of this configuration takes.

    Args:
        gpu: which kernels serve, and what they take, depends on it.
    """
    sizes = _sizes(config)
    if why_not_tiles(config) is None:
        sizes |= tile_sizes(config, sizes["logits"][0], gpu.num_processors)
    total = sum(count * prod(shape) * _WIDTHS[dtype] for count, shape, dtype in sizes.values())
    if tensor_core.why_not(gpu.capability, *kernel_types(config)) is None:
        splits = tensor_core.new_partials(config.num_heads, lambda shape, _: 4 * prod(shape))
        total += sum(splits)
    if config.head_widths is not None:
        from fd_dsa.attention import dense_prompts

        total += dense_prompts.workspace_bytes(config)
    return total


def why_not_tiles(config: DSABackendConfig) -> str | None:
    """Return why TileScores cannot serve a configuration, or None if they can."""
    layout = config.cache_layout
    sizes = layout.kv_cache_dtype, layout.block_size, config.index_n_heads
    return tile_forms.unsupported_reason(*sizes)


def kernel_types(config: DSABackendConfig) -> tuple[str, str, int, int]:
    """Return the types and widths that select a kernel of attention."""
    layout = config.cache_layout
    return config.dtype, layout.kv_cache_dtype, layout.kv_lora_rank, layout.qk_rope_head_dim


def buffer_view(buffers: Buffers, name: str, *counts: int) -> Tensor:
    """Return the start of a buffer as a tensor [*counts, *shape of a value]."""
    memory, shape = buffers[name]
    shape = counts + shape
    return memory[: prod(shape)].reshape(list(shape))
