"""DSAAttentionBackend: the step's metadata once, then what layers do with it.

Layers call four methods: a step begins with `init_attention_metadata`, then every layer calls
`write`, `select` where it has an indexer, and `attend`. What they do is in a part for each kind of
device: `host.py` for a CPU, `device.py` for device memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.host import HostAttention
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.device.allocation import Allocate
from fd_dsa.errors import ConfigError, MissingStepError
from fd_dsa.ops.arrays import check_shape
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.step import ForwardMeta, StepHints, StepMetadataBuilder

_INPUTS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables")


def cache_of(forward_meta: Any, index: int) -> Any:
    """Entry `index` of `forward_meta.caches`; MissingStepError where there is none."""
    caches = forward_meta.caches
    if caches is None or caches[index] is None:
        raise MissingStepError(
            f"forward_meta.caches[{index}] is None: the runner must allocate the caches "
            "first, as allocate_caches does"
        )
    return caches[index]


def step_inputs(forward_meta: Any) -> list[Any]:
    """The four arrays of a step that the runner has filled; MissingStepError without one."""
    inputs = [getattr(forward_meta, name, None) for name in _INPUTS]
    for name, value in zip(_INPUTS, inputs, strict=True):
        if value is None:
            raise MissingStepError(
                f"forward_meta.{name} is None: the runner's initialize_forward_meta must fill it "
                "before init_attention_metadata"
            )
    return inputs


class DSAAttentionBackend:
    """DeepSeek Sparse Attention on paged caches; one object serves all layers.

    Once a step: `init_attention_metadata`. In each layer: `write`, `select` (layers with an
    indexer), then `attend`. `forward_meta.caches` holds two tensors a layer: `caches[2 * l]`
    latents, `caches[2 * l + 1]` indexer keys (None for a layer that shares a selection).

    Args:
        device: "cpu", "gpu", "gpu:0" or a custom device of Paddle such as "name:0"; caches,
            activations and results are tensors there.
        allocate: how buffers on a device are made, as of a StepMetadataBuilder.

    Attributes:
        builder: of the step's metadata; its `num_builds` counts steps.
        attention: the part for the device.
        overlap: forks the indexer's projections to a second stream.

    Raises:
        ConfigError: bfloat16 activations on a CPU.
        BackendUnavailable: no provider serves the device, or Paddle is missing.
        MissingStepError: from what layers call: no metadata for their `forward_meta`, or no caches.
    """

    def __init__(
        self, config: DSABackendConfig, device: str = "cpu", allocate: Allocate | None = None
    ) -> None:
        if device == "cpu" and config.dtype != "float32":
            raise ConfigError(f"dtype: got {config.dtype!r}, a CPU computes in float32 alone")
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
        self.attention: Any = None
        if device == "cpu":
            self.attention = HostAttention(config)
        else:
            # kernels and their launcher are loaded only where a device is asked for
            from fd_dsa.attention.device import DeviceAttention
            from fd_dsa.device.allocation import paddle_allocator

            self.attention = DeviceAttention(config, allocate or paddle_allocator(device))
        self.overlap = IndexerOverlap(device)
        self._hints: StepHints | None = None
        self._built_for: Any = None
        self._write_params: dict[int, CacheWriteParams] = {}

    def set_step_hints(self, hints: StepHints | None) -> None:
        """What the runner knows of the step whose metadata is made next."""
        self._hints = hints

    def init_attention_metadata(self, forward_meta: Any) -> None:
        """`build_step` of the lengths and tables of `forward_meta`, which layers are called with.

        What the host knows is `forward_meta.hints`, where there are any, or the hints set last.

        Raises:
            MissingStepError: the runner has not filled the lengths or the block tables.
            ValueError: inconsistent lengths or tables, with row and value (nothing is written).
        """
        if self._built_for is forward_meta:
            return
        hints, self._hints = self._hints, None
        inputs = step_inputs(forward_meta)
        self.build_step(forward_meta, inputs, getattr(forward_meta, "hints", hints))

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
        step = self.builder.build_from(tuple(inputs), hints or StepHints())
        int32 = self.config.int32_position_ids
        forward_meta.fd_dsa_step = step
        forward_meta.position_ids = step.position_ids_int32 if int32 else step.position_ids
        forward_meta.slot_mapping = step.slot_mapping
        forward_meta.indexer_attn_mask_offsets = step.indexer_attn_mask_offsets
        self.attention_metadata = step
        self.attention.begin_step(step, getattr(forward_meta, "host_lengths", None))
        self._built_for = forward_meta

    def forget_step(self) -> None:
        """Let go of the runner's object, which holds the caches: they are about to go."""
        self._built_for = None
        self.attention.begin_step()

    def current_step(self, forward_meta: Any) -> ForwardMeta:
        """Metadata of `forward_meta`, which must be the step that the backend holds."""
        if self._built_for is not forward_meta or self.attention_metadata is None:
            reason = "the backend holds another step"
            if getattr(forward_meta, "fd_dsa_step", None) is None:
                reason = "forward_meta.fd_dsa_step is None"
            raise MissingStepError(
                f"{reason}: DSAAttentionBackend.init_attention_metadata(forward_meta) must be "
                "called first"
            )
        return self.attention_metadata

    def allocate_caches(self, has_indexer: Sequence[bool]) -> list[Any]:
        """Caches of `config.num_blocks` blocks, as `forward_meta.caches` has them."""
        layout, num_blocks = self.config.cache_layout, self.config.num_blocks or 0
        allocate = self.attention.allocate_cache
        caches: list[Any] = []
        for full in has_indexer:
            caches.append(allocate(layout.latent_shape(num_blocks)))
            caches.append(allocate(layout.indexer_shape(num_blocks)) if full else None)
        return caches

    def warm_up(self, num_tokens: int, caches: Sequence[Any]) -> None:
        """Make what a captured step of as many tokens must find there: the second stream."""
        if num_tokens <= self.overlap.max_tokens:
            self.overlap.stream_for(caches[0])

    def write(self, kv_a: Any, index_k: Any, cos_sin: Any, layer: Any, forward_meta: Any) -> None:
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
        index = 2 * layer.layer_id
        latent_cache = cache_of(forward_meta, index)
        index_cache = None if index_k is None else cache_of(forward_meta, index + 1)
        self.attention.write(step, kv_a, index_k, cos_sin, latent_cache, index_cache, params)

    def select(self, q: Any, weights: Any, layer_id: int, forward_meta: Any) -> Any:
        """Choose what this step's tokens attend to in a layer.

        Args:
            q: [num_tokens, index_n_heads, index_head_dim], as `prepare_indexer_query` makes it for
                the format of the caches.
            weights: float32 [num_tokens, index_n_heads]; all scale factors folded in.

        Returns:
            int32 [num_tokens, min(index_topk, longest row)], on a device the longest row rounded
            up; physical slots in ascending position, -1 = none. The buffer is the backend's and
            holds until the next selection.

        Raises:
            MissingStepError: also if the step has prompt tokens and no windows.
        """
        step = self.current_step(forward_meta)
        return self.attention.select(step, q, weights, cache_of(forward_meta, 2 * layer_id + 1))

    def attend_densely(
        self, q: Any, cos_sin: Any, weights: Any, reader: Any, layer_id: int, forward_meta: Any
    ) -> Any:
        """Attend for the tokens of prompts within `index_topk`; see DensePrompts.attend."""
        step, cache = self.current_step(forward_meta), cache_of(forward_meta, 2 * layer_id)
        return self.attention.dense_prompts.attend(step, q, cos_sin, cache, weights, reader)

    def attend(self, q: Any, selection: Any, layer_id: int, forward_meta: Any) -> Any:
        """Attend to the selected slots of a layer; prefill and decode tokens together.

        Args:
            q: of `config.dtype` [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim]; absorbed
                query, as `prepare_mla_query` makes it.
            selection: int32 [num_tokens, topk] or [num_tokens, 1, topk]; result of `select`.

        Returns:
            of `config.dtype` [num_tokens, num_heads, kv_lora_rank]; zeros for padded tokens. The
            buffer is the backend's and holds until the next `attend`.

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
