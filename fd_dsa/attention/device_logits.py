"""How the tokens of a step are scored on a device by the kernel for every cache and GPU."""

from __future__ import annotations

from typing import Any

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.ops.logits.triton_kernel import score_pages
from fd_dsa.step import ForwardMeta


def rounded_length(length: int, least: int, most: int) -> int:
    """The next power of two from `least` on, but no more than `most`."""
    return min(max(least, 1 << max(length - 1, 0).bit_length()), most)


class PageScores:
    """Scores in chunks of tokens, within one buffer for all layers and steps.

    Args:
        config: sizes.
        view: gives the start of the named buffer of a DeviceAttention as a tensor of a shape.
        num_logits: scores that the buffer holds.
        select_slots: as `topk.custom_op.slot_selector` gives it.

    Attributes:
        is_captured: False: no captured graph refers to anything that `prepare` makes.
    """

    is_captured = False

    def __init__(
        self, config: DSABackendConfig, view: Any, num_logits: int, select_slots: Any
    ) -> None:
        self._select_slots = select_slots
        self._block_size = config.cache_layout.block_size
        self._max_keys = config.max_blocks_per_seq * self._block_size
        self._view, self._num_logits = view, num_logits

    def prepare(self, step: ForwardMeta) -> None:
        """Nothing: these scores need no schedule."""

    def select(self, step: ForwardMeta, q: Any, weights: Any, cache: Any, slots: Any) -> None:
        """Fill `slots` with the best keys of every token."""
        num_tokens = step.position_ids.shape[0]
        width = rounded_length(step.max_seqlen_k, 64, self._max_keys)
        rows = max(1, self._num_logits // width)
        tokens = step.position_ids, step.batch_id_per_token, step.block_tables
        for first in range(0, num_tokens, rows):
            logits = self._view("logits", min(rows, num_tokens - first), width)
            score_pages(q, weights, cache, step, logits, first)
            self._select_slots(
                logits,
                *tokens,
                slots,
                block_size=self._block_size,
                num_blocks=cache.shape[0],
                first_token=first,
            )
