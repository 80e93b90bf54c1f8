"""DSAAttentionBackend: the step's metadata once, then the layers on it.

The methods and their arguments are those of FastDeploy's `AttentionBackend` (docs/design.md,
"FastDeploy's contract"), so the same class serves the embedded engine and the plug-in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.attention.cache_layout import CacheLayout
from fd_dsa.attention.step_plan import StepPlan, Tile
from fd_dsa.errors import MissingStepError
from fd_dsa.ops._host import Scratch, as_numpy, as_tensor, check_shape
from fd_dsa.ops.cache_write import write_cache
from fd_dsa.ops.indexer_logits import indexer_logits, paged_indexer_logits
from fd_dsa.ops.sparse_mla import masked_mla, sparse_mla
from fd_dsa.ops.topk import positions_to_slots, topk_indices
from fd_dsa.step import ForwardMeta, StepMetadataBuilder

_INPUTS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables")


@dataclass(frozen=True, slots=True)
class DSABackendConfig:
    """What the backend must know of the model and the engine; lengths in tokens."""

    num_heads: int
    index_n_heads: int
    index_topk: int
    softmax_scale: float
    cache_layout: CacheLayout
    max_num_seqs: int
    max_num_tokens: int
    max_blocks_per_seq: int
    num_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class StepHints:
    """What only the runner knows of a step; see StepMetadataBuilder.build."""

    num_tokens: int
    num_prefill_tokens: int
    max_seqlen_k: int
    num_padded_tokens: int | None = None


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


def _cache(forward_meta: Any, index: int) -> Any:
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

    Per step: `init_attention_metadata`. Per layer: `indexer_forward` (layers with an indexer),
    then `forward`. `forward_meta.caches` holds two tensors a layer: `caches[2 * l]` latents,
    `caches[2 * l + 1]` indexer keys (None for a layer that shares a selection).

    Args:
        config: sizes and scale.
        device: "cpu"; other devices come with their step kernel.
    """

    __infer_dynamic_dims_fields__ = ("attention_metadata",)

    def __init__(self, config: DSABackendConfig, device: str = "cpu") -> None:
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
        )
        self.attention_metadata: ForwardMeta | None = None
        self._plan: StepPlan | None = None
        self._hints: StepHints | None = None
        self._built_for: Any = None
        self._slots = np.full(config.max_num_tokens * config.index_topk, -1, np.int32)
        self._scratch = Scratch()

    def set_step_hints(self, hints: StepHints | None) -> None:
        """What the runner knows of the step whose metadata is made next."""
        self._hints = hints

    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Make the step's metadata and hang it on `forward_meta`; once per object.

        Sets `fd_dsa_step` (our ForwardMeta) and, as the same arrays, upstream's own
        `position_ids`, `slot_mapping` and `indexer_attn_mask_offsets`.

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
        hints = self._hints
        self._hints = None
        if hints is None:
            step = self.builder.build(*inputs)
        else:
            step = self.builder.build(
                *inputs,
                hints.num_padded_tokens,
                num_tokens=hints.num_tokens,
                num_prefill_tokens=hints.num_prefill_tokens,
                max_seqlen_k=hints.max_seqlen_k,
            )
        forward_meta.fd_dsa_step = step
        forward_meta.position_ids = step.position_ids
        forward_meta.slot_mapping = step.slot_mapping
        forward_meta.indexer_attn_mask_offsets = step.indexer_attn_mask_offsets
        self.attention_metadata = step
        self._plan = None
        self._built_for = forward_meta

    def get_attention_meta(self) -> ForwardMeta | None:
        """Metadata of the newest step, None before the first."""
        return self.attention_metadata

    def get_kv_cache_shape(
        self, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> tuple[list[int], list[int], list[int]]:
        """Shapes of the key (latent), value (empty) and indexer cache of a layer."""
        layout = self.config.cache_layout
        return layout.latent_shape(max_num_blocks), [], layout.indexer_shape(max_num_blocks)

    def indexer_forward(
        self, q: Any, k: Any, weights: Any, layer_id: int, forward_meta: Any
    ) -> Any:
        """Write this step's indexer keys of a layer and choose what its tokens attend to.

        Args:
            q: float32 [num_tokens, index_n_heads, index_head_dim], roped.
            k: float32 [num_tokens, index_head_dim], normed and roped.
            weights: float32 [num_tokens, index_n_heads]; both scale factors folded in.

        Returns:
            int32 [num_tokens, min(index_topk, longest row)]; physical slots in ascending position,
            -1 = none. The buffer is the backend's and holds until the next selection.
        """
        step, plan = step_of(forward_meta), self._step_plan(forward_meta)
        cache = _cache(forward_meta, 2 * layer_id + 1)
        rows = cache.reshape([-1, cache.shape[-1]])
        write_cache(rows, (k,), step.slot_mapping)
        if plan.needs_scores:
            self.select(plan, q, weights, cache)
        return as_tensor(plan.slots)

    def select(self, plan: StepPlan, q: Any, weights: Any, cache: Any) -> None:
        """Fill `plan.slots` for the tokens with more keys than `index_topk`."""
        rows = cache.reshape([-1, cache.shape[-1]])
        for tile in plan.score_tiles:
            logits = indexer_logits(
                q[tile.tokens], weights[tile.tokens], rows, tile.key_slots, self._scratch
            )
            self._keep_best(plan, tile, logits)
        if plan.decode_rows is not None:
            group = plan.decode_rows
            logits = paged_indexer_logits(
                as_numpy(q)[group.tokens],
                as_numpy(weights)[group.tokens],
                cache,
                group.units,
                self._scratch,
            )
            positions = topk_indices(logits.reshape(-1, logits.shape[2]), group.window, plan.topk)
            tokens = group.tokens.ravel()
            plan.slots[tokens] = positions_to_slots(
                positions, plan.batch_ids[tokens], plan.block_tables, self.block_size
            )

    def _keep_best(self, plan: StepPlan, tile: Tile, logits: np.ndarray) -> None:
        """Top-k of a prefill tile; a row's keys start at its `key_start` column."""
        if tile.key_start[-1] > 0:
            # several rows: bring every token's own keys to column 0
            column = tile.key_start[:, None] + np.arange(int(tile.window.max()))[None, :]
            logits = np.take_along_axis(logits, np.minimum(column, logits.shape[1] - 1), axis=1)
        positions = topk_indices(logits, tile.window, plan.topk)
        plan.slots[tile.tokens] = positions_to_slots(
            positions, plan.batch_ids[tile.tokens], plan.block_tables, self.block_size
        )

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
        """Write this step's latents of a layer and attend to the selected slots.

        Args:
            q: float32 [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim]; absorbed query.
            k, qkv: unused, for FastDeploy's signature (keys are read back from the cache).
            v: int32 [num_tokens, 1, topk] or [num_tokens, topk]; result of `indexer_forward`.
            compressed_kv: float32 [num_tokens, kv_lora_rank], after its norm.
            k_pe: float32 [num_tokens, 1, qk_rope_head_dim], roped.
            layer: object with `layer_id`.

        Returns:
            float32 [num_tokens, num_heads, kv_lora_rank]; zeros for padded tokens. The buffer is
            the backend's and holds until the next `forward`.

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
        step, plan = step_of(forward_meta), self._step_plan(forward_meta)
        if v is None:
            raise MissingStepError(
                f"layer {layer.layer_id} has no selection: indexer_forward of this layer, or of "
                "the layer it shares with, must be called first"
            )
        cache = _cache(forward_meta, 2 * layer.layer_id)
        rows = cache.reshape([-1, cache.shape[-1]])
        rope_dim = self.config.cache_layout.qk_rope_head_dim
        write_cache(rows, (compressed_kv, as_numpy(k_pe).reshape(-1, rope_dim)), step.slot_mapping)
        slots = as_numpy(v).reshape(-1, v.shape[-1])
        check_shape("forward_mixed", "v", slots, (q.shape[0], None))
        return as_tensor(self._attend(plan, as_numpy(q), rows, slots))

    def _attend(self, plan: StepPlan, q: np.ndarray, rows: Any, slots: np.ndarray) -> np.ndarray:
        """float32 [num_tokens, num_heads, kv_lora_rank]; short prompts in tiles, others one by one.

        Args:
            rows: [num_slots, width]; the layer's latent cache.
            slots: int32 [num_tokens, topk]; what each token attends to.
        """
        width = self.config.cache_layout.kv_lora_rank
        options = {
            "softmax_scale": self.config.softmax_scale,
            "kv_lora_rank": width,
            "scratch": self._scratch,
        }
        out = self._scratch.take("attention", (q.shape[0], q.shape[1], width))
        out[plan.num_tokens :] = 0.0
        for i, tile in enumerate(plan.dense_tiles):
            if plan.needs_scores:
                mask = tile.selection_mask(slots[tile.tokens], plan.slot_position)
            else:
                mask = plan.window_masks[i]
            out[tile.tokens] = masked_mla(q[tile.tokens], rows, tile.key_slots, mask, **options)
        tokens = plan.gathered_tokens
        if len(tokens) == len(q):
            out[:] = sparse_mla(q, rows, slots, **options)
        elif len(tokens):
            out[tokens] = sparse_mla(q[tokens], rows, slots[tokens], **options)
        return out

    def forward_decode(self, *args: Any, **kwargs: Any) -> Any:
        """See `forward`: a decode-only step is a mixed one without prefill."""
        return self.forward_mixed(*args, **kwargs)

    def forward_extend(self, *args: Any, **kwargs: Any) -> Any:
        """See `forward`: a prefill-only step is a mixed one without decode."""
        return self.forward_mixed(*args, **kwargs)

    def _step_plan(self, forward_meta: Any) -> StepPlan:
        """Work lists of the step of `forward_meta`, made at the first layer that asks."""
        if self._built_for is not forward_meta:
            raise MissingStepError(
                "the backend holds another step: "
                "init_attention_metadata(forward_meta) must be called first for this one"
            )
        if self._plan is None:
            config = self.config
            self._plan = StepPlan(
                step_of(forward_meta),
                block_size=self.block_size,
                index_topk=config.index_topk,
                index_n_heads=config.index_n_heads,
                num_heads=config.num_heads,
                slots=self._slots,
            )
        return self._plan
