"""Copies of the states of rows between a device and host memory, in the order of the steps."""

from __future__ import annotations

from fd_dsa.runner.protocol import BlockStore, StateCopy


class HostStateCopy:
    """StateCopy with places in host memory after those of the device.

    A copy to or from host memory waits for all work before it, and all later work waits for the
    copy. So copies and steps need no other order.

    Args:
        copy: copies a state from one place of the device to another.
        store: host memory, whose blocks are the places of the device.
        num_places: number of places of the device.
    """

    def __init__(self, copy: StateCopy, store: BlockStore, num_places: int) -> None:
        self._copy, self._store, self._num_places = copy, store, num_places
        self._num_copies = 0

    def __call__(self, source: int, target: int) -> None:
        """Enqueue a copy. At least one of both places is on the device."""
        store, first_in_host, loads = self._store, self._num_places, source >= self._num_places
        if not loads and target < first_in_host:
            self._copy(source, target)
            return
        place, slot = (target, source) if loads else (source, target)
        self._num_copies += 1
        store.begin()
        store.copy(loads, place, slot - first_in_host, 1)
        store.end(self._num_copies)
        store.precede(self._num_copies)
