"""Selection and attention of a step on a CPU: the work lists of its StepPlan, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.step_plan import StepPlan, Tile
from fd_dsa.ops._host import Scratch, as_numpy, check_shape
from fd_dsa.ops.logits.paddle_impl import score_gathered, score_paged
from fd_dsa.ops.mla.paddle_impl import attend_dense, attend_gathered
from fd_dsa.ops.providers import settle
from fd_dsa.ops.topk.paddle_impl import positions_to_slots, select_positions
from fd_dsa.step import ForwardMeta
from fd_dsa.step.host_tensor import as_tensor


class HostAttention:
    """Reads the caches that `write_caches` fills; its buffers serve every layer and step.

    Args:
        config: sizes and scale.
    """

    def __init__(self, config: DSABackendConfig) -> None:
        self.config = config
        self.block_size = config.cache_layout.block_size
        self._slots = np.full(config.max_num_tokens * config.index_topk, -1, np.int32)
        self._scratch = Scratch()
        self._plan: StepPlan | None = None
        settle("cpu")

    def begin_step(self, step: ForwardMeta | None = None) -> None:
        """Forget the plan of the step before."""
        self._plan = None

    def query_buffers(self, num_tokens: int) -> None:
        """None: on a CPU `prepare_indexer_query` works in the memory of its input."""

    def projection_buffers(self, num_tokens: int) -> None:
        """On a CPU `project_indexer` allocates."""

    def mla_query_buffer(self, num_tokens: int) -> None:
        """None: on a CPU `prepare_mla_query` makes its result."""

    def plan(self, step: ForwardMeta) -> StepPlan:
        """Work lists of the step, made at the first layer that asks."""
        if self._plan is None:
            config = self.config
            self._plan = StepPlan(
                step,
                block_size=self.block_size,
                index_topk=config.index_topk,
                index_n_heads=config.index_n_heads,
                num_heads=config.num_heads,
                slots=self._slots,
            )
        return self._plan

    def select(self, step: ForwardMeta, q: Any, weights: Any, cache: Any) -> Any:
        """See DSAAttentionBackend.indexer_forward; `cache` is the layer's indexer cache."""
        plan = self.plan(step)
        if plan.needs_scores:
            self._score(plan, as_numpy(q), as_numpy(weights), cache)
        return as_tensor(plan.slots)

    def attend(self, step: ForwardMeta, q: Any, cache: Any, selection: Any) -> Any:
        """See DSAAttentionBackend.forward; `cache` is the layer's latent cache."""
        slots = as_numpy(selection).reshape(-1, selection.shape[-1])
        check_shape("forward_mixed", "v", slots, (q.shape[0], None))
        rows = cache.reshape([-1, cache.shape[-1]])
        return as_tensor(self._attend(self.plan(step), as_numpy(q), rows, slots))

    def _score(self, plan: StepPlan, q: np.ndarray, weights: np.ndarray, cache: Any) -> None:
        """Fill `plan.slots` for the tokens with more keys than `index_topk`."""
        for tile in plan.score_tiles:
            logits = score_gathered(
                q[tile.tokens], weights[tile.tokens], cache, tile.key_slots, self._scratch
            )
            self._keep_best(plan, tile, logits)
        if plan.decode_rows is not None:
            group = plan.decode_rows
            logits = score_paged(
                q[group.tokens], weights[group.tokens], cache, group.units, self._scratch
            )
            positions = select_positions(
                logits.reshape(-1, logits.shape[2]), group.window, plan.topk
            )
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
        positions = select_positions(logits, tile.window, plan.topk)
        plan.slots[tile.tokens] = positions_to_slots(
            positions, plan.batch_ids[tile.tokens], plan.block_tables, self.block_size
        )

    def _attend(self, plan: StepPlan, q: np.ndarray, rows: Any, slots: np.ndarray) -> np.ndarray:
        """float32 [num_tokens, num_heads, kv_lora_rank]; short prompts in tiles, others one by one.

        Args:
            rows: [num_slots, row]; the layer's latent cache.
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
            out[tile.tokens] = attend_dense(q[tile.tokens], rows, tile.key_slots, mask, **options)
        tokens = plan.gathered_tokens
        if len(tokens) == len(q):
            out[:] = attend_gathered(q, rows, slots, **options)
        elif len(tokens):
            out[tokens] = attend_gathered(q[tokens], rows, slots[tokens], **options)
        return out
