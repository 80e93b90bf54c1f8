"""DSAAttentionBackend: the step's metadata once, then the layers on it.

The methods and their arguments are those of FastDeploy's `AttentionBackend` (docs/design.md,
"FastDeploy's contract"), so the same class serves the embedded engine and the plug-in. What a
layer does lies in a part behind it: `host.py` for a CPU, `device.py` for device memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fd_dsa.attention.config import DSABackendConfig, StepHints
from fd_dsa.attention.host import HostAttention
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.errors import ConfigError, MissingStepError
from fd_dsa.ops import unchecked
from fd_dsa.ops._host import check_shape
from fd_dsa.ops.cache_write import CacheWriteParams, write_caches
from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from fd_dsa.step.builder import Allocate

_INPUTS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables")


def step_of(forward_meta: Any) -> ForwardMeta:
    """The step's metadata of a runner's `forward_meta`.

    Raises:
        MissingStepError: it has not been made yet.
    """
    step = getattr(forward_meta, "fd_dsa_step", None)
    if step is None:
        raise MissingStepError(
            "forward_meta.fd_dsa_step is None: "
            "DSAAttentionBackend.init_attention_metadata(forward_meta) must be called first"
        )
    return step


def _attention_on(device: str, config: DSABackendConfig, allocate: Allocate | None) -> Any:
    """The part of the backend that serves a device."""
    if device == "cpu":
        return HostAttention(config)
    # kernels and their launcher are loaded only where a device is asked for
    from fd_dsa.attention.device import DeviceAttention, empty_allocator

    return DeviceAttention(config, allocate or empty_allocator(device))


def cache_of(forward_meta: Any, index: int) -> Any:
    """Entry `index` of `forward_meta.caches`.

    Raises:
        MissingStepError: the caches have not been allocated.
    """
    caches = forward_meta.caches
    if caches is None or caches[index] is None:
        raise MissingStepError(
            f"forward_meta.caches[{index}] is None: the runner must allocate the caches of "
            "get_kv_cache_shape first"
        )
    return caches[index]


class DSAAttentionBackend:
    """DeepSeek Sparse Attention on paged caches; one object serves all layers.

    Per step: `init_attention_metadata`. Per layer: `write_caches`, `indexer_forward` (layers with
    an indexer), then `forward`; a model that calls no `write_caches` gives its keys to the other
    two, normed and rotated. `forward_meta.caches` holds two tensors a layer: `caches[2 * l]`
    latents, `caches[2 * l + 1]` indexer keys (None for a layer that shares a selection).

    Args:
        config: sizes and scale.
        device: "cpu", "gpu", "gpu:0" or a custom device of Paddle such as "name:0"; caches,
            activations and results are tensors there.
        allocate: how buffers on a device are made, as of a StepMetadataBuilder.

    Attributes:
        builder: of the step's metadata; its `num_builds` counts steps.
        overlap: forks the indexer's projections to a second stream.

    Raises:
        ConfigError: bfloat16 activations on a CPU.
        BackendUnavailable: no provider serves the device, or Paddle is missing.
    """

    __infer_dynamic_dims_fields__ = ("attention_metadata",)

    def __init__(
        self, config: DSABackendConfig, device: str = "cpu", allocate: Allocate | None = None
    ) -> None:
        if device == "cpu" and config.dtype != "float32":
            raise ConfigError(f"dtype: got {config.dtype!r}, a CPU computes in float32 alone")
        self.config = config
        layout = config.cache_layout
        self.block_size = layout.block_size
        self.builder = StepMetadataBuilder(
            config.max_num_seqs,
            config.max_num_tokens,
            config.max_blocks_per_seq,
            layout.block_size,
            num_blocks=config.num_blocks,
            device=device,
            allocate=allocate,
            int32_position_ids=config.int32_position_ids,
        )
        self.attention_metadata: ForwardMeta | None = None
        self.attention = _attention_on(device, config, allocate)
        self.overlap = IndexerOverlap(device)
        self._hints: StepHints | None = None
        self._built_for: Any = None
        self._write_params: dict[int, CacheWriteParams] = {}
        # of keys that come normed and rotated
        self._plain_params = CacheWriteParams(
            layout.kv_cache_dtype,
            index_hadamard=layout.index_hadamard,
            index_scale_fmt=layout.index_scale_fmt,
        )

    def set_step_hints(self, hints: StepHints | None) -> None:
        """What the runner knows of the step whose metadata is made next."""
        self._hints = hints

    def init_attention_metadata(self, forward_meta: Any) -> None:
        """`build_step` of the lengths and tables of `forward_meta`, with the hints set last.

        Raises:
            MissingStepError: the runner has not filled the lengths or the block tables.
            ValueError: inconsistent lengths or tables, with row and value (nothing is written).
        """
        if self._built_for is forward_meta:
            return
        inputs = []
        for name in _INPUTS:
            value = getattr(forward_meta, name, None)
            if value is None:
                raise MissingStepError(
                    f"forward_meta.{name} is None: the runner's initialize_forward_meta must "
                    "fill it before init_attention_metadata"
                )
            inputs.append(value)
        hints, self._hints = self._hints, None
        self.build_step(forward_meta, inputs, hints)

    def build_step(
        self, forward_meta: Any, inputs: Sequence[Any], hints: StepHints | None = None
    ) -> None:
        """Make the metadata of a step and hang it on `forward_meta`; once per object.

        For runners whose `forward_meta` holds longer arrays than the step has rows. Sets
        `fd_dsa_step` (our ForwardMeta) and, as the same arrays, upstream's own `position_ids`
        (int32 where the configuration asks), `slot_mapping` and `indexer_attn_mask_offsets`.

        Args:
            forward_meta: any object that takes attributes; the layers are called with it.
            inputs: the four arrays of `StepMetadataBuilder.build`, in its order.
            hints: what the host knows of the step; needed with tensors on a device.

        Raises:
            ValueError: inconsistent lengths or tables, with row and value (nothing is written),
                or a hint that is missing or wrong.
        """
        if self._built_for is forward_meta:
            return
        known = hints or StepHints()
        step = self.builder.build(
            *inputs,
            known.num_padded_tokens,
            num_tokens=known.num_tokens,
            num_prefill_tokens=known.num_prefill_tokens,
            max_seqlen_k=known.max_seqlen_k,
        )
        int32 = self.config.int32_position_ids
        forward_meta.fd_dsa_step = step
        forward_meta.position_ids = step.position_ids_int32 if int32 else step.position_ids
        forward_meta.slot_mapping = step.slot_mapping
        forward_meta.indexer_attn_mask_offsets = step.indexer_attn_mask_offsets
        self.attention_metadata = step
        self.attention.begin_step(step)
        self._built_for = forward_meta

    def forget_step(self) -> None:
        """Let go of the runner's object, which holds the caches: they are about to go."""
        self._built_for = None
        self.attention.begin_step()

    def current_step(self, forward_meta: Any) -> ForwardMeta:
        """Metadata of `forward_meta`, which must be the step that the backend holds.

        Raises:
            MissingStepError: `init_attention_metadata` has not been called for it.
        """
        step = step_of(forward_meta)
        if self._built_for is not forward_meta:
            raise MissingStepError(
                "the backend holds another step: "
                "init_attention_metadata(forward_meta) must be called first for this one"
            )
        return step

    def get_attention_meta(self) -> ForwardMeta | None:
        """Metadata of the newest step, None before the first."""
        return self.attention_metadata

    def get_kv_cache_shape(
        self, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> tuple[list[int], list[int], list[int]]:
        """Shapes of the key (latent), value (empty) and indexer cache of a layer."""
        layout = self.config.cache_layout
        return layout.latent_shape(max_num_blocks), [], layout.indexer_shape(max_num_blocks)

    def query_buffers(self, num_tokens: int) -> tuple[Any, Any] | None:
        """Where `prepare_indexer_query` should write for `indexer_forward`; None = anywhere."""
        return self.attention.query_buffers(num_tokens)

    def projection_buffers(self, num_tokens: int) -> tuple[Any, Any] | None:
        """Where `project_indexer` should write; None = anywhere."""
        return self.attention.projection_buffers(num_tokens)

    def mla_query_buffer(self, num_tokens: int) -> Any:
        """Where `prepare_mla_query` should write for `forward`; None = anywhere, as on a CPU."""
        return self.attention.mla_query_buffer(num_tokens)

    def write_caches(
        self, kv_a: Any, index_k: Any, cos_sin: Any, layer: Any, forward_meta: Any
    ) -> None:
        """Write this step's keys of a layer, latents and indexer keys together.

        Args:
            kv_a: of `config.dtype` [num_tokens, kv_lora_rank + qk_rope_head_dim], as projected:
                neither normed nor rotated; a column slice of wider rows is allowed.
            index_k: likewise [num_tokens, index_head_dim], as projected; None in a layer that
                shares a selection.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin, gathered once a step.
            layer: object with `layer_id` and `cache_write_params(layout)`, which says once how the
                keys are normed.
        """
        step = self.current_step(forward_meta)
        params = self._write_params.get(layer.layer_id)
        if params is None:
            params = layer.cache_write_params(self.config.cache_layout)
            self._write_params[layer.layer_id] = params
        caches = 2 * layer.layer_id
        unchecked.write_caches(
            kv_a,
            index_k,
            None,
            step.slot_mapping,
            cos_sin,
            cache_of(forward_meta, caches),
            None if index_k is None else cache_of(forward_meta, caches + 1),
            params,
        )

    def indexer_forward(
        self, q: Any, k: Any, weights: Any, layer_id: int, forward_meta: Any
    ) -> Any:
        """Choose what this step's tokens attend to in a layer.

        Args:
            q: [num_tokens, index_n_heads, index_head_dim], as `prepare_indexer_query` makes it for
                the format of the caches.
            k: None after `write_caches`; else of `config.dtype` [num_tokens, index_head_dim],
                normed and rotated, which is written first.
            weights: float32 [num_tokens, index_n_heads]; all scale factors folded in.

        Returns:
            int32 [num_tokens, min(index_topk, longest row)], on a device the longest row rounded
            up; physical slots in ascending position, -1 = none. The buffer is the backend's and
            holds until the next selection.
        """
        step = self.current_step(forward_meta)
        cache = cache_of(forward_meta, 2 * layer_id + 1)
        if k is not None:
            slots = step.slot_mapping
            write_caches(None, k, None, slots, None, None, cache, self._plain_params)
        return self.attention.select(step, q, weights, cache)

    def forward(
        self,
        q: Any,
        k: Any,
        v: Any,
        qkv: Any,
        compressed_kv: Any,
        k_pe: Any,
        layer: Any,
        forward_meta: Any,
    ) -> Any:
        """Attend to the selected slots of a layer.

        Args:
            q: of `config.dtype` [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim]; absorbed
                query, as `prepare_mla_query` makes it.
            k, qkv: unused, for FastDeploy's signature (keys are read back from the cache).
            v: int32 [num_tokens, 1, topk] or [num_tokens, topk]; result of `indexer_forward`.
            compressed_kv: None after `write_caches`; else of `config.dtype` [num_tokens,
                kv_lora_rank], after its norm, which is written first.
            k_pe: likewise [num_tokens, 1, qk_rope_head_dim], rotated; None with `compressed_kv`.
            layer: object with `layer_id`.

        Returns:
            of `config.dtype` [num_tokens, num_heads, kv_lora_rank]; zeros for padded tokens. The
            buffer is the backend's and holds until the next `forward`.

        Raises:
            MissingStepError: `init_attention_metadata` has not been called for `forward_meta`.
        """
        return self.forward_mixed(q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta)

    def forward_mixed(
        self,
        q: Any,
        k: Any,
        v: Any,
        qkv: Any,
        compressed_kv: Any,
        k_pe: Any,
        layer: Any,
        forward_meta: Any,
    ) -> Any:
        """See `forward`; prefill and decode tokens go through it once, together."""
        step = self.current_step(forward_meta)
        if v is None:
            raise MissingStepError(
                f"layer {layer.layer_id} has no selection: indexer_forward of this layer, or of "
                "the layer it shares with, must be called first"
            )
        cache, layout = cache_of(forward_meta, 2 * layer.layer_id), self.config.cache_layout
        width = layout.kv_lora_rank + layout.qk_rope_head_dim
        check_shape("forward", "q", q, (None, None, width))
        if compressed_kv is not None:
            rows = self._joined(compressed_kv, k_pe, step)
            slots = step.slot_mapping
            write_caches(rows, None, None, slots, None, cache, None, self._plain_params)
        return self.attention.attend(step, q, cache, v)

    def _joined(self, compressed_kv: Any, k_pe: Any, step: ForwardMeta) -> Any:
        """Latents and rotary keys side by side, as `write_caches` takes them."""
        layout = self.config.cache_layout
        num_tokens = step.slot_mapping.shape[0]
        rope = k_pe.reshape([-1, layout.qk_rope_head_dim])
        check_shape("forward", "compressed_kv", compressed_kv, (num_tokens, layout.kv_lora_rank))
        check_shape("forward", "k_pe", rope, (num_tokens, layout.qk_rope_head_dim))
        # Paddle only here: tensors of another library come with their keys joined
        from fd_dsa.ops._linear import joined

        return joined(compressed_kv, rope)

    def forward_decode(self, *args: Any, **kwargs: Any) -> Any:
        """See `forward`: a decode-only step is a mixed one without prefill."""
        return self.forward_mixed(*args, **kwargs)

    def forward_extend(self, *args: Any, **kwargs: Any) -> Any:
        """See `forward`: a prefill-only step is a mixed one without decode."""
        return self.forward_mixed(*args, **kwargs)
