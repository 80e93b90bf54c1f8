"""Tokens of a step drawn where its logits are: ids come back to the host, logits do not."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fd_dsa.ops.sampling import DeviceSampler, SlotParameters
from fd_dsa.step.staging import InputStaging
from fd_dsa.step.views import CACHED_VIEWS, Allocate

__all__ = ["DeviceDraws", "SlotParameters", "draw_bytes"]


class DeviceDraws:
    """Draws of a runner: parameters by slot, one copy to the device a step, one wait for the ids.

    Args:
        max_num_seqs: slots, and most rows of a step.
        vocab_size: logits of a row.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, allocate: Allocate) -> None:
        self._sampler = DeviceSampler(max_num_seqs, vocab_size, allocate)
        self._rows = max_num_seqs
        self._inputs = InputStaging(allocate, 3 * max_num_seqs)
        transfers = self._inputs.transfers
        self._ids = transfers.host_buffer(8 * max_num_seqs).view(np.int64)
        self._transfers, self._copied = transfers, transfers.event()
        self._views = lru_cache(maxsize=CACHED_VIEWS)(self._new_views)

    def set_slot(self, slot: int, parameters: SlotParameters) -> None:
        """How the rows of a slot are sampled from now on."""
        self._sampler.set_slot(slot, parameters)

    def __call__(self, logits: Any, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Draw a token for each row, and wait for them.

        Args:
            logits: float32 [n, vocab_size] on the device, contiguous.
            slots, positions: int64 [n]; slot of each row, and position of the token in its output.

        Returns:
            int64 [n], as of `Sampler.sample`; valid until the next call.
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
        ids = self._ids[:count]
        self._transfers.to_host(ids, self._sampler.tokens)
        self._copied.record()
        # the step's one wait
        self._copied.wait()
        return ids

    def _new_views(self, index: int, count: int) -> tuple[Any, ...]:
        """Slots, positions and mask rows of a slab."""
        slab, rows = self._inputs.slabs[index], self._rows
        return tuple(slab[first : first + count] for first in range(0, 3 * rows, rows))


def draw_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Bytes that DeviceDraws takes on the device at most."""
    return max_num_seqs * (12 * vocab_size + (80 << 10))
