"""Selection and attention on a device: launches over pages, with buffers that never move.

One launch covers the tokens of prompts and of decode rows. A prompt token sees the keys of its
window in `indexer_attn_mask_offsets`, a decode token sees the keys up to its position. The counts
that the host knows determine grids and views. So the host reads no tensor back, and allocates only
the first views of a size.

A DeviceAttention selects the fastest kernels that support its sizes and types
(`fd_dsa.ops.providers`).
"""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from typing import TYPE_CHECKING, cast

from fd_dsa import custom_ops
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.device_memory import buffer_sizes
from fd_dsa.attention.device_scores import SelectedScores, kernel_kind
from fd_dsa.attention.head_exchange import HeadExchange, exchanges_heads
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.attention.protocol import HostLengths, IndexerLayer, MlaLayer, PromptLimits
from fd_dsa.attention.row_division import RowDivision
from fd_dsa.device.allocation import CACHED_VIEWS, Allocate, Buffers, add_buffers, buffer_view
from fd_dsa.distributed import Group
from fd_dsa.errors import KernelUnavailable
from fd_dsa.ops.arrays import check_shape, rounded_length, values_of
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.ops.cache_write.triton_kernel import write_caches
from fd_dsa.ops.head_gemm import absorb_queries
from fd_dsa.ops.key_bounds import prompt_windows
from fd_dsa.ops.linear import Linear
from fd_dsa.ops.mla.custom_op import kind_for
from fd_dsa.ops.mla.records import DequantizedRecords, keys_per_token
from fd_dsa.ops.mla.tensor_core import TensorCoreAttention, select_attention
from fd_dsa.ops.mla.triton_kernel import attend_slots
from fd_dsa.ops.providers import (
    CUSTOM_OP,
    TENSOR_CORE,
    TRITON,
    function,
    is_refused,
    refuse,
    select_all,
    select_provider,
)
from fd_dsa.ops.query_kernels import prepare_indexer_query
from fd_dsa.ops.topk.custom_op import slot_selector
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.device_api import traits_for

if TYPE_CHECKING:
    from fd_dsa.attention.dense_prompts import DensePrompts
    from fd_dsa.ops.device_matrix import DeviceMatrix

logger = logging.getLogger(__name__)
Projected = tuple[Tensor, Tensor, Tensor, Tensor]
"""Latents of queries and keys, index keys and head weights of a layer."""
_PROJECTION = "indexer_projection"


class DeviceAttention:
    """Writer and reader of the caches, with buffers that all layers and steps share.

    Args:
        allocate: allocator of contiguous tensors on the device.
        group: ranks that divide the scores of long steps, and the attention if they exchange heads;
            None = one rank.

    Attributes:
        dense_prompts: dense attention of prompts within `index_topk`, None if all prompts attend
            in the absorbed form.
        dense: `dense_prompts` if the step has dense tokens, else None.
        exchange: exchange of heads if the step's tokens are divided among ranks, else None.
        scores: kernels that score keys.
        tensor_core_attention: attention on tensor cores, None if `attend_slots` attends.
    """

    def __init__(
        self, config: DSABackendConfig, allocate: Allocate, group: Group | None = None
    ) -> None:
        self.config, self._allocate = config, allocate
        self._division = RowDivision(group, config.index_topk)
        self._query_format = config.query_format
        self._buffers: Buffers = {}
        add_buffers(self._buffers, buffer_sizes(config), allocate)
        self._view = lru_cache(maxsize=CACHED_VIEWS)(partial(buffer_view, self._buffers))
        # address of the cache of the layer that made the slots, and the slots
        self._all_slots: tuple[int, Tensor] | None = None
        self._kind = kind = kernel_kind(self._buffers["logits"][0])
        select_all(kind)
        self._select_projection()
        self._select_slots = slot_selector(kind, allocate)
        self.scores = SelectedScores(config.indexer, kind, self._buffers, allocate)
        self._exchange = self._new_exchange(group)
        self.exchange: HeadExchange | None = None
        self._select_attention()
        self.dense_prompts: DensePrompts | None = None
        self.dense: DensePrompts | None = None
        if config.head_widths is not None:
            # other libraries' tensors have no dense prompts, whose module imports Paddle
            from fd_dsa.attention.dense_prompts import dense_prompts_for

            traits = traits_for(self._buffers["logits"][0])
            self.dense_prompts = dense_prompts_for(config, allocate, traits)

    def _new_exchange(self, group: Group | None) -> HeadExchange | None:
        """Return the exchange of heads among ranks, or None if they do not exchange heads."""
        config = self.config
        if group is None or config.exchange_ranks == 1 or not exchanges_heads(group):
            return None
        layout, heads = config.cache_layout, config.exchanged_heads
        width = layout.kv_lora_rank + layout.qk_rope_head_dim
        # the same memory, which holds a part of the tokens with more heads
        self._buffers["whole_q"] = self._buffers["mla_q"][0], (heads, width)
        self._buffers["whole_latents"] = self._buffers["latents"][0], (heads, layout.kv_lora_rank)
        return HeadExchange(config, group, self._view, self._attend)

    def _select_attention(self) -> None:
        """Select the kernels of the attention, for the heads of this rank and of all ranks."""
        self._whole_attention = None
        if self._exchange is not None:
            self._whole_attention = self._new_attention(self.config.exchanged_heads)
        self.tensor_core_attention = self._new_attention(self.config.num_heads)

    def _new_attention(self, heads: int) -> TensorCoreAttention | None:
        """Return the attention on tensor cores, or None if `attend_slots` is selected."""
        kind, config, logits = self._kind, self.config, self._buffers["logits"][0]
        types = config.kernel_types
        capability = traits_for(logits).capability
        selected = select_attention(kind, heads, *types, capability, self._allocate)
        if selected.provider == TRITON:
            return None
        own = None
        if selected.provider == CUSTOM_OP:
            own = kind_for(heads, config.cache_layout.is_fp8)
        custom = own(custom_ops.build().kernels) if own else None
        # the buffer of scores is free when the tokens of a layer attend
        # with the heads of all ranks a rank has a part of each row's tokens
        most = keys_per_token(heads) * config.num_heads // heads
        records = DequantizedRecords(logits, most, config.max_num_seqs)
        always = is_refused("sparse_mla", kind, TENSOR_CORE)
        given = heads, config.softmax_scale, self._allocate
        return TensorCoreAttention(*given, custom, always, records)

    def _select_projection(self) -> None:
        """Select the provider of the indexer's projections."""
        provider = select_provider(_PROJECTION, self._kind).provider
        self._project_indexer = function(_PROJECTION, provider)
        # a GEMM of Paddle runs on the stream of its cuBLAS handle, which a fork does not change
        self._may_fork = provider == TRITON

    def _refuse_projection(self, error: KernelUnavailable) -> None:
        """Select the next provider of the indexer's projections."""
        refuse(_PROJECTION, self._kind, TRITON, error)
        self._select_projection()

    def begin_step(
        self,
        step: ForwardMeta | None = None,
        lengths: HostLengths | PromptLimits | None = None,
    ) -> None:
        """Reset the state that the layers of a step share, and prepare it for `step`.

        Also called before the replay of layers that were captured without it.

        Args:
            step: next step; None after the last one.
            lengths: lengths of its rows, or their limits in a capture, if the host knows them.
        """
        self._all_slots = self.dense = self.exchange = None
        if step is None:
            return
        if self._division.is_active:
            self._division.begin_step(step, lengths)
        dense = self.dense_prompts
        if dense is not None and lengths is not None and step.num_prefill_tokens:
            try:
                self.dense = dense if dense.begin_step(step, lengths) else None
            except KernelUnavailable as error:
                self.absorb_prompts(error)
        exchange = self._exchange
        if exchange is not None and exchange.begin_step(step, lengths, self.dense is not None):
            self.exchange = exchange
        if step.max_seqlen_k > self.config.index_topk or self.scores.kernels.is_captured:
            part = self._division.part(step.position_ids.shape[0])
            self.scores.prepare(step, part)

    def absorb_prompts(self, error: KernelUnavailable) -> None:
        """Attend for all prompts in the absorbed form, because a dense kernel is unavailable."""
        self.dense_prompts = self.dense = None
        logger.warning("attention of prompts: absorbed from now on (%s)", error)

    def query_buffers(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the buffers of the two results of `prepare_indexer_query`."""
        return self._view("index_q", num_tokens), self._view("index_weights", num_tokens)

    def projection_buffers(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the buffers of the indexer's projections, index keys and head weights."""
        return self._view("index_k", num_tokens), self._view("head_weights", num_tokens)

    def mla_query_buffer(self, num_tokens: int) -> Tensor:
        """Return the buffer of the absorbed query, which `attend` reads."""
        return self._view("mla_q", num_tokens)

    def allocate_cache(self, shape: list[int]) -> Tensor:
        """Allocate a cache with arbitrary contents: only written values are read."""
        layout = self.config.cache_layout
        return self._allocate(tuple(shape), layout.format.device_dtype)

    def project(
        self, layer: MlaLayer, indexer: IndexerLayer, hidden: Tensor, overlap: IndexerOverlap
    ) -> Projected:
        """Project a layer's input, for the indexer on a second stream if the step forks."""
        # the indexer's projections are never FP8
        values, num_tokens = values_of(hidden), hidden.shape[0]
        out, work = self.projection_buffers(num_tokens), partial(layer.project_qkv_a, hidden)

        def project(x: Tensor) -> tuple[Tensor, Tensor]:
            return indexer.project(x, self._project_indexer, out)

        forked = num_tokens if self._may_fork else 0
        (latent, kv_a, joined), (index_k, weights) = overlap.run(
            forked, work, project, values, refuse=self._refuse_projection
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
        """Write the keys of a step, see DSAAttentionBackend.write."""
        slots = step.slot_mapping
        write_caches(kv_a, index_k, None, slots, cos_sin, latent_cache, index_cache, params)

    def prepare_indexer_query(
        self, q: Tensor, weights: Tensor, cos_sin: Tensor, rope_interleave: bool
    ) -> tuple[Tensor, Tensor]:
        """Convert queries of an indexer to the format of its keys, by `indexer_query`."""
        out = self.query_buffers(q.shape[0])
        how = {"rope_interleave": rope_interleave, **self._query_format}
        return prepare_indexer_query(q, weights, None, cos_sin, out=out, **how)

    def absorbed_query(
        self, keys: Linear, q: Tensor, rows: Tensor | None, cos_sin: Tensor
    ) -> Tensor:
        """Run `absorb_queries`, with its result in `mla_query_buffer`."""
        weight = cast("DeviceMatrix", keys).values
        return absorb_queries(q, weight, cos_sin, self.mla_query_buffer(q.shape[0]), rows)

    def select(self, step: ForwardMeta, q: Tensor, weights: Tensor, cache: Tensor) -> Tensor:
        """Select keys, see DSAAttentionBackend.select. The cache is the layer's indexer cache.

        If all rows have at most `index_topk` keys, a token sees all of its keys. Then scores are
        not needed, and the layers of the step share one selection.
        """
        if step.max_seqlen_k <= self.config.index_topk:
            layer = cache.data_ptr()
            # a capture after a warm-up runs the layer again, and its graph needs the launch
            if self._all_slots is None or self._all_slots[0] == layer:
                self._all_slots = layer, self._all_keys(step, cache)
            return self._all_slots[1]
        num_tokens = step.position_ids.shape[0]
        slots = self._view("slots", num_tokens, self.config.index_topk)
        use, part = partial(self._fill_slots, slots, step, cache), self._division.part(num_tokens)
        self.scores.compute(step, part, q, weights, cache, use)
        self._division.gather(slots)
        return slots

    def attend(self, step: ForwardMeta, q: Tensor, cache: Tensor, selection: Tensor) -> Tensor:
        """Attend, see DSAAttentionBackend.attend. The cache is the layer's latent cache."""
        num_tokens = q.shape[0]
        if len(selection.shape) == 3:
            selection = selection.reshape([selection.shape[0], -1])
        dense = self.dense
        if dense is not None and dense.other_step is not None:
            step, selection = dense.other_step, dense.slots_of_others(selection)
        check_shape("attend", "selection", selection, (num_tokens, None))
        out = self._view("latents", num_tokens)
        self._attend(step, q, cache, selection, out)
        return out

    def _attend(
        self, step: ForwardMeta, q: Tensor, cache: Tensor, selection: Tensor, out: Tensor
    ) -> None:
        """Fill `out` by the selected kernel, or by the next one after a failed compilation."""
        try:
            self._attend_once(step, q, cache, selection, out)
        except KernelUnavailable as error:
            if self._kernel_for(q) is None:
                raise
            refuse("sparse_mla", self._kind, TENSOR_CORE, error)
            self._select_attention()
            self._attend_once(step, q, cache, selection, out)

    def _kernel_for(self, q: Tensor) -> TensorCoreAttention | None:
        """Return the attention on tensor cores for the heads of a query, see `_new_attention`."""
        is_own = q.shape[1] == self.config.num_heads
        return self.tensor_core_attention if is_own else self._whole_attention

    def _attend_once(
        self, step: ForwardMeta, q: Tensor, cache: Tensor, selection: Tensor, out: Tensor
    ) -> None:
        """Fill `out` by the selected kernel."""
        kernel = self._kernel_for(q)
        if kernel is None:
            scale, rank = self.config.softmax_scale, self.config.cache_layout.kv_lora_rank
            attend_slots(q, cache, selection, out, softmax_scale=scale, kv_lora_rank=rank)
        else:
            kernel.attend(q, cache, selection, out, step=step)

    def _all_keys(self, step: ForwardMeta, cache: Tensor) -> Tensor:
        """Return the selection of a step whose tokens see all of their keys."""
        num_tokens = step.position_ids.shape[0]
        width = rounded_length(step.max_seqlen_k, self.config.index_topk)
        slots = self._view("slots", num_tokens, width)
        self._fill_slots(slots, step, cache, self._view("logits", 1, 1), num_rows=num_tokens)
        return slots

    def _fill_slots(
        self, slots: Tensor, step: ForwardMeta, cache: Tensor, logits: Tensor, **rows: int
    ) -> None:
        """Fill rows of `slots` with the keys of the best `logits`, by `select_slots`."""
        self._select_slots(
            logits,
            *(step.position_ids, step.batch_id_per_token, step.block_tables, slots),
            block_size=self.config.cache_layout.block_size,
            num_blocks=cache.shape[0],
            windows=prompt_windows(step),
            **rows,
        )
