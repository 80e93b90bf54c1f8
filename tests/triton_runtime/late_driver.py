"""A CUDA driver in host memory that does nothing until a test lets it: streams, events, copies.

Every stream is a queue. `step` runs the first entry of one of them, as a device might: in order
within a stream, in any order between them. So a test decides what is late, and a copy reads its
source when it runs, not when it was queued.

    library = LateLibrary()
    library.launch(MAIN, reader)            # instead of a kernel
    library.run(MAIN)                       # all that does not wait for another stream
"""

from __future__ import annotations

import ctypes
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fd_dsa.triton_runtime import register_device_api
from tests.triton_runtime.fakes import FakeApi, FakeLibrary, FakeTensor, driven_by

MAIN = FakeApi.stream
_FIRST_STREAM = 0x5000
_NOT_READY, _CAPTURE_UNSUPPORTED = 600, 900


class LateLibrary(FakeLibrary):
    """The driver.

    Attributes:
        log: calls in their order: ("wait", stream, event), ("record", stream, event),
            ("h2d", "d2h" or "d2d", stream, number of bytes), ("sync", event),
            ("sync stream", stream), ("free", what).
        captured: streams that are being captured.
        refused: names of functions that answer with an error.
    """

    def __init__(self, seed: int = 0, num_devices: int = 1) -> None:
        super().__init__(num_devices=num_devices)
        self.log: list[tuple[Any, ...]] = []
        self.captured: set[int] = set()
        self.refused: set[str] = set()
        self._random = random.Random(seed)
        self._queues: dict[int, deque[tuple[Callable[[], bool], Callable[[], None]]]] = {}
        # how often each event was recorded by the host, and by the device
        self._recorded: list[int] = []
        self._reached: list[int] = []

    def _queue(self, stream: int, ready: Callable[[], bool], work: Callable[[], None]) -> None:
        self._queues.setdefault(stream, deque()).append((ready, work))

    def launch(self, stream: int, work: Callable[[], None]) -> None:
        """Queue what a kernel would do."""
        self._queue(stream, lambda: True, work)

    def step(self, stream: int | None = None) -> bool:
        """Run one entry of a stream, or of any; False if all of them are empty or wait."""
        streams = list(self._queues) if stream is None else [stream]
        self._random.shuffle(streams)
        for name in streams:
            queue = self._queues.get(name)
            if queue and queue[0][0]():
                queue.popleft()[1]()
                return True
        return False

    def run(self, stream: int | None = None) -> None:
        """Run a stream, or all, as far as they come."""
        while self.step(stream):
            pass

    @property
    def num_events(self) -> int:
        """Events that were made."""
        return len(self._recorded)

    def num_queued(self, stream: int) -> int:
        """Entries of a stream that are still to run."""
        return len(self._queues.get(stream, ()))

    def _call(self, name: str, *note: Any) -> int:
        """The code of a call, which is noted if it succeeds."""
        if self.needs_context and self.context() is None:
            return 201
        if name in self.refused:
            return _CAPTURE_UNSUPPORTED
        self.log.append(note)
        return 0

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:
        assert flags.value == 1, "a blocking stream waits for the default one"
        stream._obj.value = _FIRST_STREAM + len(self._queues)
        self._queues[stream._obj.value] = deque()
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        code = self._call("cuStreamSynchronize", "sync stream", stream.value)
        while not code and self.num_queued(stream.value):
            assert self.step(), "the device waits forever"
        return code

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        assert not self._queues.pop(stream.value), "a stream is destroyed with work on it"
        self.log.append(("free", "stream"))
        return 0

    def cuStreamIsCapturing(self, stream: Any, status: Any) -> int:
        status._obj.value = int(stream.value in self.captured)
        return 0

    def cuEventCreate(self, event: Any, flags: Any) -> int:
        assert flags.value == 2, "an event with timing costs more"
        self._recorded.append(0)
        self._reached.append(0)
        event._obj.value = len(self._recorded)
        return 0

    def cuEventDestroy_v2(self, event: Any) -> int:
        self.log.append(("free", "event"))
        return 0

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        code = self._call("cuEventRecord", "record", stream.value, event.value)
        if not code:
            index = event.value - 1
            self._recorded[index] += 1
            number = self._recorded[index]
            self.launch(stream.value, lambda: self._reached.__setitem__(index, number))
        return code

    def cuStreamWaitEvent(self, stream: Any, event: Any, flags: Any) -> int:
        assert flags.value == 0
        code = self._call("cuStreamWaitEvent", "wait", stream.value, event.value)
        if not code:
            index = event.value - 1
            number = self._recorded[index]
            self._queue(stream.value, lambda: self._reached[index] >= number, lambda: None)
        return code

    def _is_reached(self, event: Any) -> bool:
        return self._reached[event.value - 1] == self._recorded[event.value - 1]

    def cuEventQuery(self, event: Any) -> int:
        return 0 if self._is_reached(event) else _NOT_READY

    def cuEventSynchronize(self, event: Any) -> int:
        code = self._call("cuEventSynchronize", "sync", event.value)
        while not code and not self._is_reached(event):
            assert self.step(), "the device waits forever"
        return code

    def cuMemFreeHost(self, address: Any) -> int:
        self.log.append(("free", "host"))
        return super().cuMemFreeHost(address)

    def _copy(self, name: str, kind: str, target: Any, source: Any, size: Any, stream: Any) -> int:
        code = self._call(name, kind, stream.value, size.value)
        if not code:
            places = target.value, source.value, size.value
            self.launch(stream.value, lambda: ctypes.memmove(*places) and None)
        return code

    def cuMemcpyHtoDAsync_v2(self, *arguments: Any) -> int:
        return self._copy("cuMemcpyHtoDAsync_v2", "h2d", *arguments)

    def cuMemcpyDtoHAsync_v2(self, *arguments: Any) -> int:
        return self._copy("cuMemcpyDtoHAsync_v2", "d2h", *arguments)

    def cuMemcpyDtoDAsync_v2(self, *arguments: Any) -> int:
        return self._copy("cuMemcpyDtoDAsync_v2", "d2d", *arguments)


class LateTensor(FakeTensor):
    """A tensor in the memory of the late device.

    Attributes:
        values: what it holds now; reading it waits for nothing.
        log: of the driver; an entry is added when the tensor is freed.
    """

    log: list[tuple[Any, ...]]

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.values = np.full(shape, -9, dtype)
        super().__init__(self.values.ctypes.data, f"fake.{dtype}", shape)
        weakref.finalize(self, self.log.append, ("free", "tensor"))


@contextmanager
def late_driver(seed: int = 0) -> Iterator[LateLibrary]:
    """The late device instead of CUDA."""
    register_device_api(LateTensor, FakeApi())
    with driven_by(LateLibrary(seed)) as library:
        LateTensor.log = library.log
        yield library
