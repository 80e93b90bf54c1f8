"""Attention backend of DSA: metadata once a step, then the attention of each layer.

A layer calls `forward`. Layers with other projections call its public parts: `write`, `select` in a
layer with an indexer, and `attend`. `host.py` computes on a CPU, `device.py` on a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.host import HostAttention
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.attention.protocol import (
    BackendStep,
    FilledStep,
    HostLengths,
    IndexerLayer,
    MlaLayer,
    PromptLimits,
    WrittenLayer,
)
from fd_dsa.attention.step_arrays import step_inputs
from fd_dsa.device.allocation import Allocate
from fd_dsa.distributed import Group
from fd_dsa.errors import ConfigError, KernelUnavailable, MissingStepError
from fd_dsa.ops.arrays import check_shape
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.step import ForwardMeta, StepHints, StepMetadataBuilder
from fd_dsa.tensor import StepArray

if TYPE_CHECKING:
    from fd_dsa.attention.device import DeviceAttention


class DSAAttentionBackend:
    """DeepSeek Sparse Attention on paged caches, one object for all layers.

    The runner calls `init_attention_metadata` once a step. Each layer calls `forward`, or its parts
    `write`, `select` (layers with an indexer) and `attend`. `forward_meta.caches` holds two tensors
    for each layer: `caches[2 * l]` latents, `caches[2 * l + 1]` indexer keys (None for a layer that
    shares a selection).

    Args:
        config: sizes of the model and of the largest step.
        device: "cpu", "gpu", "gpu:0" or a custom device of Paddle such as "name:0"; caches,
            activations and results are tensors there.
        allocate: allocator of buffers on a device, see StepMetadataBuilder.
        group: ranks that share the model and divide the scores of long steps; None = one rank.

    Attributes:
        builder: builder of the metadata; its `num_builds` counts steps.
        attention: writer and reader of the caches for the kind of device.
        overlap: forks the indexer's projections to a second stream.
        attention_metadata: metadata of the newest step, None before the first.
        can_read_selections: True on a CPU; the selections of a device stay in its memory.

    Raises:
        ConfigError: bfloat16 activations on a CPU.
        BackendUnavailable: the device has no provider, or Paddle is missing.
        MissingStepError: a layer is called without the metadata of its `forward_meta`, or without
            caches.
    """

    def __init__(
        self,
        config: DSABackendConfig,
        device: str = "cpu",
        allocate: Allocate | None = None,
        group: Group | None = None,
    ) -> None:
        if device == "cpu" and config.dtype != "float32":
            raise ConfigError(
                f"dtype: got {config.dtype!r}; must be float32 on a CPU; use float32, or a device"
            )
        self.config = config
        self.block_size = config.cache_layout.block_size
        self.builder = StepMetadataBuilder(
            config.max_num_seqs,
            config.max_num_tokens,
            config.max_blocks_per_seq,
            self.block_size,
            num_blocks=config.num_blocks,
            device=device,
            allocate=allocate,
            int32_position_ids=config.int32_position_ids,
        )
        self.attention_metadata: ForwardMeta | None = None
        self.can_read_selections = device == "cpu"
        self.attention: HostAttention | DeviceAttention
        if device == "cpu":
            self.attention = HostAttention(config, group)
        else:
            # kernels and their launcher are loaded only if a device is asked for
            from fd_dsa.attention.device import DeviceAttention
            from fd_dsa.device.allocation import paddle_allocator

            self.attention = DeviceAttention(config, allocate or paddle_allocator(device), group)
        self.overlap = IndexerOverlap(device)
        self._hints: StepHints | None = None
        self._built_for: BackendStep | None = None
        self._write_params: dict[int, CacheWriteParams] = {}

    def set_step_hints(self, hints: StepHints | None) -> None:
        """Set the host's counts of the step whose metadata is built next."""
        self._hints = hints

    def init_attention_metadata(
        self,
        forward_meta: FilledStep,
        hints: StepHints | None = None,
        host_lengths: HostLengths | None = None,
    ) -> None:
        """Build the metadata of a step from the lengths and tables of `forward_meta`.

        See `build_step`. Without `hints` the counts of `set_step_hints` apply, for this step only.

        Raises:
            MissingStepError: the runner has not filled the lengths or the block tables.
            ValueError: inconsistent lengths or tables, with row and value (nothing is written).
        """
        if self._built_for is forward_meta:
            return
        known, self._hints = hints or self._hints, None
        self.build_step(forward_meta, step_inputs(forward_meta), known, host_lengths)

    def build_step(
        self,
        forward_meta: BackendStep,
        inputs: Sequence[StepArray],
        hints: StepHints | None = None,
        host_lengths: HostLengths | PromptLimits | None = None,
    ) -> None:
        """Build the metadata of a step and attach it to `forward_meta`.

        A second call with the same object has no effect.

        For runners whose `forward_meta` holds longer arrays than the step has rows. Sets
        `fd_dsa_step` (our ForwardMeta) and, as the same arrays, upstream's own `position_ids`
        (int32 if the configuration asks for it), `slot_mapping` and `indexer_attn_mask_offsets`.

        Args:
            forward_meta: any object that allows new attributes; the layers are called with it.
            inputs: the four arrays of `StepMetadataBuilder.build`, in its order. Further ones are
                ignored.
            hints: counts that the host knows of the step; required for tensors on a device.
            host_lengths: lengths of the rows, or their limits in a capture, if the host knows them.
                Without them all prompts on a device attend in the absorbed form.

        Raises:
            ValueError: inconsistent lengths or tables, with row and value (nothing is written),
                or a hint that is missing or wrong.
        """
        if self._built_for is forward_meta:
            return
        step = self.builder.build_from(tuple(inputs[:4]), hints or StepHints())
        int32 = self.config.int32_position_ids
        forward_meta.fd_dsa_step = step
        forward_meta.position_ids = step.position_ids_int32 if int32 else step.position_ids
        forward_meta.slot_mapping = step.slot_mapping
        forward_meta.indexer_attn_mask_offsets = step.indexer_attn_mask_offsets
        self.attention_metadata = step
        self.attention.begin_step(step, host_lengths)
        self._built_for = forward_meta

    def drop_step_state(self) -> None:
        """Release the runner's object before the caches that it holds are freed."""
        self._built_for = None
        self.attention.begin_step()

    def current_step(self, forward_meta: BackendStep) -> ForwardMeta:
        """Return the metadata of `forward_meta`, which must be the step built last."""
        if self._built_for is not forward_meta or self.attention_metadata is None:
            raise MissingStepError(
                "the backend holds no step or another step: "
                "DSAAttentionBackend.init_attention_metadata(forward_meta) must be called first"
            )
        return self.attention_metadata

    @property
    def max_gathered_keys(self) -> int:
        """See AttentionBackend."""
        part = self.attention
        dense = None if isinstance(part, HostAttention) else part.dense_prompts
        return 0 if dense is None else dense.max_keys

    def padded_tokens(self, num_tokens: int) -> int:
        """See AttentionBackend. No padding helps."""
        return num_tokens

    def allocate_caches(self, has_indexer: Sequence[bool]) -> list[StepArray | None]:
        """Allocate caches of `config.num_blocks` blocks in the order of `forward_meta.caches`."""
        layout, num_blocks = self.config.cache_layout, self.config.num_blocks or 0
        allocate = self.attention.allocate_cache
        caches: list[StepArray | None] = []
        for full in has_indexer:
            caches.append(allocate(layout.latent_shape(num_blocks)))
            caches.append(allocate(layout.indexer_shape(num_blocks)) if full else None)
        return caches

    def warm_up(self, num_tokens: int, caches: Sequence[StepArray | None]) -> None:
        """Make the second stream, if a captured step of `num_tokens` tokens forks to it."""
        if num_tokens <= self.overlap.max_tokens:
            latents = caches[0]
            assert latents is not None, "every layer has latents"
            self.overlap.stream_for(latents)

    def as_captured(self) -> AbstractContextManager[None]:
        """Fork eager steps inside as captured ones, for a warm-up before the captures."""
        return self.overlap.as_captured()

    def forward(
        self,
        layer: MlaLayer,
        hidden: StepArray,
        rotation: StepArray,
        forward_meta: BackendStep,
        shared: StepArray | None = None,
    ) -> tuple[StepArray, StepArray | None]:
        """Write the keys of a layer, select keys and attend to them, see AttentionBackend.

        Args:
            rotation: float32 [num_tokens, qk_rope_head_dim]; cos, then sin.

        Returns:
            [num_tokens, num_heads * v_head_dim], in the form that `layer.o_proj` reads; and the
            selection of `select`, None if all tokens attend densely.
        """
        part, indexer = self.attention, layer.indexer
        if indexer is None:
            latent, kv_a, index_k = layer.project_qkv_a(hidden)
            self.write(kv_a, None, rotation, layer, forward_meta)
            selection = shared
        else:
            projected = part.project(layer, indexer, hidden, self.overlap)
            latent, kv_a, index_k, weights = projected
            self.write(kv_a, index_k, rotation, layer, forward_meta)
            dense, selection = part.dense, None
            if dense is None or not dense.has_all:
                selection = self._selection(indexer, latent, weights, rotation, forward_meta)
        try:
            return self._values(layer, latent, selection, rotation, forward_meta), selection
        except KernelUnavailable as error:
            if isinstance(part, HostAttention) or part.dense is None:
                raise
            part.absorb_prompts(error)
        if selection is None and indexer is not None:
            selection = self._selection(indexer, latent, weights, rotation, forward_meta)
        return self._values(layer, latent, selection, rotation, forward_meta), selection

    def _selection(
        self,
        indexer: IndexerLayer,
        latent: StepArray,
        weights: StepArray,
        rotation: StepArray,
        forward_meta: BackendStep,
    ) -> StepArray:
        """Return the selection of an indexer for the latents of the queries."""
        q, interleaved = indexer.queries(latent), indexer.rope_interleave
        q, weights = self.attention.prepare_indexer_query(q, weights, rotation, interleaved)
        return self.select(q, weights, indexer.layer_id, forward_meta)

    def _values(
        self,
        layer: MlaLayer,
        latent: StepArray,
        selection: StepArray | None,
        rotation: StepArray,
        forward_meta: BackendStep,
    ) -> StepArray:
        """Return the values of all heads, see `forward`."""
        q, dense = layer.queries(latent), self.attention.dense
        exchange = self.attention.exchange
        if exchange is not None and selection is not None:
            cache = cache_of(forward_meta, 2 * layer.layer_id)
            return exchange.attend(q, rotation, cache, selection, layer)
        merged = tokens = None
        if dense is not None:
            cache = cache_of(forward_meta, 2 * layer.layer_id)
            merged = dense.attend(self.current_step(forward_meta), q, rotation, cache, layer)
            if dense.has_all:
                return merged
            q, tokens = dense.of_others(q), dense.others
        query = self.attention.absorbed_query(layer.k_b_proj, q, tokens, rotation)
        found = self.attend(query, selection, layer.layer_id, forward_meta)
        if dense is not None and merged is not None:
            return dense.with_others(merged, found, layer)
        return layer.v_b_proj.matmul_join_heads(found, layer.o_proj)

    def write(
        self,
        kv_a: StepArray,
        index_k: StepArray | None,
        cos_sin: StepArray,
        layer: WrittenLayer,
        forward_meta: BackendStep,
    ) -> None:
        """Write this step's keys of a layer, latents and indexer keys together.

        Args:
            kv_a: `config.dtype` [num_tokens, kv_lora_rank + qk_rope_head_dim], neither normed nor
                rotated; a column slice of wider rows is allowed.
            index_k: `config.dtype` [num_tokens, index_head_dim], neither normed nor rotated; None
                in a layer that shares a selection.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin, gathered once a step.
            layer: layer whose `cache_write_params` hold the norms of its keys.
            forward_meta: step of the keys.
        """
        step = self.current_step(forward_meta)
        params = self._write_params.get(layer.layer_id)
        if params is None:
            params = layer.cache_write_params(self.config.cache_layout)
            self._write_params[layer.layer_id] = params
        index = 2 * layer.layer_id
        latent_cache = cache_of(forward_meta, index)
        index_cache = None if index_k is None else cache_of(forward_meta, index + 1)
        self.attention.write(step, kv_a, index_k, cos_sin, latent_cache, index_cache, params)

    def select(
        self, q: StepArray, weights: StepArray, layer_id: int, forward_meta: BackendStep
    ) -> StepArray:
        """Select the keys that this step's tokens attend to in a layer.

        Args:
            q: [num_tokens, index_n_heads, index_head_dim], result of `prepare_indexer_query` in the
                format of the caches.
            weights: float32 [num_tokens, index_n_heads]; all scale factors folded in.

        Returns:
            int32 [num_tokens, min(index_topk, longest row)], on a device the longest row rounded
            up; physical slots in ascending position, -1 = padding. The next selection overwrites
            the buffer.

        Raises:
            MissingStepError: also if the step has prompt tokens and no windows.
        """
        step = self.current_step(forward_meta)
        return self.attention.select(step, q, weights, cache_of(forward_meta, 2 * layer_id + 1))

    def attend(
        self, q: StepArray, selection: StepArray | None, layer_id: int, forward_meta: BackendStep
    ) -> StepArray:
        """Attend to the selected slots of a layer, for prefill and decode tokens together.

        Args:
            q: `config.dtype` [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim]; absorbed
                query, result of `absorbed_query` or of the operator `prepare_mla_query`.
            selection: int32 [num_tokens, topk] or [num_tokens, 1, topk]; result of `select`.

        Returns:
            `config.dtype` [num_tokens, num_heads, kv_lora_rank]; zeros for padded tokens. The next
            `attend` overwrites the buffer.

        Raises:
            MissingStepError: also without a selection.
        """
        step = self.current_step(forward_meta)
        if selection is None:
            raise MissingStepError(
                f"layer {layer_id} has no selection: select of this layer, or of the layer it "
                "shares with, must be called first"
            )
        layout = self.config.cache_layout
        width = layout.kv_lora_rank + layout.qk_rope_head_dim
        if q.shape[-1] != width:
            check_shape("attend", "q", q, (None, None, width))
        return self.attention.attend(step, q, cache_of(forward_meta, 2 * layer_id), selection)


def cache_of(forward_meta: BackendStep, index: int) -> StepArray:
    """Return entry `index` of `forward_meta.caches`.

    Raises:
        MissingStepError: the runner has not allocated the cache.
    """
    caches = forward_meta.caches
    if caches is None or caches[index] is None:
        raise MissingStepError(
            f"forward_meta.caches[{index}] is None: the runner must allocate the caches "
            "first, as allocate_caches does"
        )
    return caches[index]
