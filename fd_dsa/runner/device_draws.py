"""Tokens of a step drawn where its logits are: ids come back to the host, logits do not.

The next step may be queued before they have come: it reads them where they were drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from fd_dsa.ops.sampling import DeviceSampler, SlotParameters
from fd_dsa.ops.sampling.draw_kernels import FILL_BLOCK, fill_drawn_kernel
from fd_dsa.step.staging import InputStaging
from fd_dsa.step.views import CACHED_VIEWS, Allocate

__all__ = ["DeviceDraws", "SlotParameters", "draw_bytes"]


class DeviceDraws:
    """Draws of a runner: parameters by slot, one copy to the device a step and one back.

    Args:
        max_num_seqs: slots, and most rows of a step.
        vocab_size: logits of a row.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, allocate: Allocate) -> None:
        self._sampler = DeviceSampler(max_num_seqs, vocab_size, allocate)
        # sections that begin at multiples of 16 bytes: the kernels have one form
        self._rows = -(-max_num_seqs // 4) * 4
        self._inputs = InputStaging(allocate, 3 * self._rows)
        self._transfers = transfers = self._inputs.transfers
        # of the draw that is taken, and of the next one
        self._results = [
            (transfers.host_buffer(8 * max_num_seqs).view(np.int64), transfers.event())
            for _ in range(2)
        ]
        self._views = lru_cache(maxsize=CACHED_VIEWS)(self._new_views)

    def set_slot(self, slot: int, parameters: SlotParameters) -> None:
        """How the rows of a slot are sampled from now on."""
        self._sampler.set_slot(slot, parameters)

    def __call__(
        self, logits: Any, slots: np.ndarray, positions: np.ndarray
    ) -> Callable[[], np.ndarray]:
        """Queue the draw of a token for each row.

        Args:
            logits: float32 [n, vocab_size] on the device, contiguous.
            slots, positions: int64 [n]; slot of each row, and position of the token in its output.

        Returns:
            What waits for the tokens: int64 [n], as of `Sampler.sample`, valid until two draws
            later.
        """
        inputs, count, rows = self._inputs, len(slots), self._rows
        slab = inputs.next_slab()
        # no row has a mask: a request with a grammar is sampled on the host
        for section, values in enumerate((slots, positions, -1)):
            slab[section * rows : section * rows + count] = values
        index = inputs.upload(3 * rows)
        inputs.acquire(index)
        self._sampler.sample(logits, *self._views(index, count))
        inputs.release(index)
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

    def _new_views(self, index: int, count: int) -> tuple[Any, ...]:
        """Slots, positions and mask rows of a slab."""
        slab, rows = self._inputs.slabs[index], self._rows
        return tuple(slab[first : first + count] for first in range(0, 3 * rows, rows))


def draw_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Bytes that DeviceDraws takes on the device at most."""
    return max_num_seqs * (12 * vocab_size + (80 << 10))
