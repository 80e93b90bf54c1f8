"""Tokens of a step drawn where its logits are: ids come back to the host, logits do not.

The next step may be queued before they have come: it reads them where they were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fd_dsa.ops.sampling import DeviceSampler, SlotParameters
from fd_dsa.ops.sampling.draw_kernels import FILL_BLOCK, fill_drawn_kernel
from fd_dsa.step.staging import StagedInputs
from fd_dsa.step.views import Allocate

__all__ = ["DeviceDraws", "SlotParameters", "draw_bytes"]


class DeviceDraws:
    """Draws of a runner: parameters by slot, one copy to the device a step and one back.

    A draw is `place`, `queue`, which may be captured, and `results`.

    Args:
        max_num_seqs: slots, and most rows of a step.
        vocab_size: logits of a row.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, allocate: Allocate) -> None:
        self.max_rows = max_num_seqs
        self._sampler = DeviceSampler(max_num_seqs, vocab_size, allocate)
        # slot and position of each row, and as a table the row of its mask
        self._inputs = StagedInputs(allocate, (max_num_seqs,) * 2, max_num_seqs, 1)
        self._views: list[Any] = []
        self._transfers = transfers = self._inputs.staging.transfers
        # of the draw that is taken, and of the next one
        self._results = [
            (transfers.host_buffer(8 * max_num_seqs).view(np.int64), transfers.event())
            for _ in range(2)
        ]
        # how the rows of a slot are sampled from then on; see DeviceSampler
        self.set_slot = self._sampler.set_slot

    def place(
        self,
        slots: np.ndarray,
        positions: np.ndarray,
        masks: Mapping[int, np.ndarray],
        num_padded_rows: int,
    ) -> None:
        """Queue the copies of what the next draw is made by, to places that never move.

        Args:
            slots, positions: int64 [n]; slot of each row, and position of the token in its output.
            masks: of the rows that have one, see `DeviceSampler.set_masks`.
            num_padded_rows: rows of the draw; those from n on get no token.
        """
        padding = num_padded_rows - len(slots)
        mask_rows = np.full((num_padded_rows, 1), -1)
        if masks:
            mask_rows[list(masks), 0] = range(len(masks))
            self._sampler.set_masks(np.stack(list(masks.values())))
        rows = np.pad(slots, (0, padding), constant_values=-1), np.pad(positions, (0, padding))
        self._views = self._inputs.upload(rows, mask_rows)

    def queue(self, logits: Any) -> Any:
        """Queue the draw that was placed; its tokens, int64 on the device.

        Args:
            logits: float32 [num_padded_rows, vocab_size] on the device, contiguous.
        """
        self._sampler.sample(logits, *self._views)
        return self._sampler.tokens

    def results(self, count: int) -> Callable[[], np.ndarray]:
        """Queue the copy of the first tokens of the draw.

        Returns:
            What waits for them: int64 [count], as of `Sampler.sample`, valid until two draws
            later.
        """
        ids, copied = self._results[0]
        self._results.reverse()
        self._transfers.to_host(ids[:count], self._sampler.tokens)
        copied.record()

        def taken() -> np.ndarray:
            # the step's one wait
            copied.wait()
            return ids[:count]

        return taken

    def fill(self, token_ids: Any) -> None:
        """Replace ids below 0 by tokens of the draw before.

        Args:
            token_ids: int32 [n] on the device; -1 - i is the token of row i.
        """
        count = token_ids.shape[0]
        fill_drawn_kernel[(-(-count // FILL_BLOCK),)](
            token_ids, self._sampler.tokens, count, BLOCK=FILL_BLOCK, num_warps=4
        )


def draw_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Bytes that DeviceDraws takes on the device at most."""
    return max_num_seqs * (12 * vocab_size + (80 << 10))
