"""A step of host arrays is not overwritten while its copy to the device is still to come."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fd_dsa.step.staging import NUM_SLABS, StagingRing
from fd_dsa.triton_runtime.transfers import Event, RawStream, Transfers
from tests.kernel_memory import KernelMemory

pytestmark = pytest.mark.triton
SIZE = 8


class LateDevice(Transfers):
    """A device that does nothing until it is waited for: the worst case of asynchrony."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = 0
        self.memory = np.zeros(SIZE, np.int32)
        self.seen: list[list[int]] = []

    def to_device(self, target: object, source: np.ndarray) -> None:
        self.queue.append(lambda: self._copy(source))

    def _copy(self, source: np.ndarray) -> None:
        self.memory[: len(source)] = source
        self.seen.append(self.memory.tolist())

    def event(self) -> Event:
        return LateEvent(self)

    def run_until(self, position: int) -> None:
        while self.done < position:
            self.queue[self.done]()
            self.done += 1


class LateEvent(Event):
    """Done when the device has done what was queued before it."""

    def __init__(self, device: LateDevice) -> None:
        self._device, self._position = device, 0

    def record(self, stream: RawStream | None = None) -> None:
        self._position = len(self._device.queue)

    def done(self) -> bool:
        return self._device.done >= self._position

    def wait(self) -> None:
        self._device.run_until(self._position)


def _run_steps(ring: StagingRing, device: LateDevice, steps: int, lag: int | None) -> None:
    """Upload step numbers; the device has done all but the last `lag` steps, None = none."""
    for step in range(steps):
        if lag is not None:
            device.run_until(step - lag)
        ring.slabs[ring.next_slab()][:] = step
        ring.upload(SIZE)
    device.run_until(steps)


def test_a_caller_far_ahead_of_the_device_spoils_no_step() -> None:
    device = LateDevice()
    ring = StagingRing(np.zeros(SIZE, np.int32), transfers=device)
    _run_steps(ring, device, 12, lag=None)
    assert device.seen == [[step] * SIZE for step in range(12)]
    assert ring.num_waits == 12 - NUM_SLABS


@pytest.mark.parametrize("lag", [0, 1, NUM_SLABS - 1])
def test_an_engine_that_waits_for_sampled_ids_is_never_held_back(lag: int) -> None:
    device = LateDevice()
    ring = StagingRing(np.zeros(SIZE, np.int32), transfers=device)
    _run_steps(ring, device, 12, lag)
    assert device.seen == [[step] * SIZE for step in range(12)]
    assert ring.num_waits == 0


def test_the_late_device_shows_a_slab_that_is_not_guarded() -> None:
    device = LateDevice()
    ring = StagingRing(np.zeros(SIZE, np.int32), transfers=device)
    ring.copied = [Event() for _ in ring.slabs]
    _run_steps(ring, device, 12, lag=None)
    assert device.seen != [[step] * SIZE for step in range(12)]


def test_only_the_first_values_are_copied() -> None:
    device = LateDevice()
    ring = StagingRing(np.zeros(SIZE, np.int32), transfers=device)
    ring.slabs[ring.next_slab()][:] = 7
    ring.upload(3)
    device.run_until(1)
    assert device.memory.tolist() == [7] * 3 + [0] * (SIZE - 3)


def test_a_copy_in_a_capture_is_refused() -> None:
    device = LateDevice()
    device.is_capturing = lambda: True  # type: ignore[method-assign]
    ring = StagingRing(np.zeros(SIZE, np.int32), transfers=device)
    with pytest.raises(RuntimeError, match="graph capture"):
        ring.next_slab()


def test_many_uploads_without_a_wait_arrive_in_order(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    size = 1 << 20 if m.large else 100
    target = m.poisoned((size,), "int32")
    snapshots = []
    ring = StagingRing(target)
    for step in range(40):
        slab = ring.slabs[ring.next_slab()]
        slab[:] = step
        ring.upload(size)
        if step % 10 == 9:
            snapshots.append((step, m.get(target)))
    for step, found in snapshots:
        assert (found == step).all()
