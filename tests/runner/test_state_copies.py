"""Copies of states to places in host memory and back."""

from __future__ import annotations

import numpy as np

from fd_dsa.runner.block_store import HostBlockStore
from fd_dsa.runner.state_copies import HostStateCopy


class RecordingStore(HostBlockStore):
    """Host memory whose calls are kept in order."""

    def __init__(self, states: np.ndarray, num_slots: int) -> None:
        super().__init__([states], num_slots)
        self.calls: list[str] = []

    def begin(self) -> None:
        self.calls.append("begin")

    def end(self, number: int) -> None:
        self.calls.append(f"end {number}")

    def precede(self, number: int) -> None:
        self.calls.append(f"precede {number}")


def test_places_after_those_of_the_device_are_in_host_memory() -> None:
    states = np.arange(12, dtype=np.float32).reshape(4, 3)
    store = RecordingStore(states, 2)

    def on_device(source: int, target: int) -> None:
        states[target] = states[source]

    copy = HostStateCopy(on_device, store, len(states))
    copy(3, 0)
    assert store.calls == []
    for source, target in ((2, 5), (0, 4), (1, 2), (5, 1), (4, 3)):
        copy(source, target)
    assert states[:, 0].tolist() == [9, 6, 3, 9]
    # steps wait for each copy, and the copy for the steps before it
    assert store.calls == [
        call for n in range(1, 5) for call in ("begin", f"end {n}", f"precede {n}")
    ]
