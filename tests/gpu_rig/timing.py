"""Times of work on CUDA streams by raw events of the driver, and work that takes long.

Paddle's `Event` has no time on a custom device and costs 12 us; these cost 0.1 us. In the forms
without a GPU all work is done at once, on the host's clock, so that a test runs through there too.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import paddle

from fd_dsa.device.transfers import FixedCopy
from fd_dsa.triton_runtime import paddle_jit
from fd_dsa.triton_runtime.driver import cuda
from tests.gpu_rig.rig import Rig
from tests.gpu_rig.transfers import replaced

import triton.language as tl  # isort: skip

_WITH_TIMING = 0
_BUSY_NODES = 8
_CALIBRATION_ROUNDS, _CALIBRATIONS = 50_000, 40


class Clock:
    """Points in the work of streams, numbered from 0 on.

    Args:
        rig: a real form has events, the others the time at which a point is set.
        num_points: so many are made beforehand, as making one takes longer than setting it.
    """

    def __init__(self, rig: Rig, num_points: int = 0) -> None:
        self._rig, self._main = rig, rig.stream().value
        self._points: list[Any] = []
        self._spare = [self._new() for _ in range(num_points)] if rig.is_real else []

    def _new(self) -> ctypes.c_void_p:
        """An event with timing."""
        event = ctypes.c_void_p()
        cuda().call(0, "cuEventCreate", ctypes.byref(event), ctypes.c_uint(_WITH_TIMING))
        return event

    def mark(self, stream: int | None = None) -> int:
        """Set the next point after all work of a stream, None = Paddle's at construction."""
        if self._rig.is_real:
            point = self._spare.pop() if self._spare else self._new()
            handle = ctypes.c_void_p(self._main if stream is None else stream)
            cuda().call(0, "cuEventRecord", point, handle)
        else:
            point = time.perf_counter_ns() / 1e3
        self._points.append(point)
        return len(self._points) - 1

    def is_past(self, point: int) -> bool:
        """Return True if the work before a point is done."""
        return not self._rig.is_real or cuda().library.cuEventQuery(self._points[point]) == 0

    def wait(self, point: int) -> None:
        """Block the host until the work before a point is done."""
        if self._rig.is_real:
            cuda().call(0, "cuEventSynchronize", self._points[point])

    def times_us(self) -> list[float]:
        """Times of all points since the first one, once all their work is done; frees them."""
        paddle.device.synchronize(self._rig.device)
        if not self._rig.is_real:
            return [point - self._points[0] for point in self._points]
        elapsed_ms, times = ctypes.c_float(), []
        for point in self._points:
            out = ctypes.byref(elapsed_ms)
            cuda().call(0, "cuEventElapsedTime", out, self._points[0], point)
            times.append(elapsed_ms.value * 1e3)
        for event in (*self._points, *self._spare):
            cuda().call(0, "cuEventDestroy_v2", event)
        self._points, self._spare = [], []
        return times


def around_copies(before: Callable[[FixedCopy], Any], after: Callable[[FixedCopy], Any]) -> Any:
    """Inside the block these run around the queueing of every copy from host memory."""

    def change(original: Callable[..., Any]) -> Any:
        def queue(copy: FixedCopy, num_bytes: int) -> None:
            if copy.kind != "h2d":
                return original(copy, num_bytes)
            before(copy)
            original(copy, num_bytes)
            after(copy)
            return None

        return queue

    return replaced(FixedCopy, "queue", change)


@contextmanager
def timed_copies(
    clock: Clock, before: Callable[[FixedCopy], Any] | None = None
) -> Iterator[list[tuple[int, int]]]:
    """Points right before and after each copy from host memory, on the stream of the copy.

    Args:
        clock: sets the points.
        before: called before the first point of a copy is set.
    """
    begins: list[int] = []
    spans: list[tuple[int, int]] = []

    def begin(copy: FixedCopy) -> None:
        if before is not None:
            before(copy)
        begins.append(clock.mark(stream_of(copy)))

    with around_copies(begin, lambda c: spans.append((begins.pop(), clock.mark(stream_of(c))))):
        yield spans


def stream_of(copy: FixedCopy) -> int | None:
    """Handle of the stream of a copy, None for the current one."""
    return None if copy.stream is None else copy.stream.value


@paddle_jit(do_not_specialize=("rounds",))
def spin_kernel(out_ptr, rounds):
    x = tl.load(out_ptr)
    for _ in range(rounds):
        x = x ^ (x << 5)
        x = x ^ (x >> 3)
    tl.store(out_ptr, x)


class Spin:
    """Keeps one multiprocessor busy for a time; the rest of the device is free."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._memory = paddle.to_tensor(np.ones(1, np.int32), place=rig.place)
        self._launch = spin_kernel.bind((1,), self._memory, 1, scalars=("rounds",), num_warps=1)
        self._rounds_per_us = self._calibrate() if rig.is_real else 0.0

    def _calibrate(self) -> float:
        """Rounds a microsecond in the shortest of some launches, which wake the clocks too."""
        clock = Clock(self._rig)
        clock.mark()
        for _ in range(_CALIBRATIONS):
            self._launch(_CALIBRATION_ROUNDS)
            clock.mark()
        times = clock.times_us()
        return _CALIBRATION_ROUNDS / min(b - a for a, b in pairwise(times))

    def __call__(self, us: float) -> None:
        """Queue a kernel of about so many microseconds on the current stream."""
        self._launch(max(1, round(us * self._rounds_per_us)))

    def graph(self, us: float) -> Callable[[], Any]:
        """A graph of several such kernels that together take as long; calling it replays it."""

        def work() -> None:
            for _ in range(_BUSY_NODES):
                self(us / _BUSY_NODES)

        return self._rig.captured(work)


class HostDelay:
    """Makes a stream sleep without a kernel: the driver calls `usleep` of the C library on it."""

    def __init__(self, rig: Rig) -> None:
        self._is_real = rig.is_real
        self._sleep = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p)

    def __call__(self, stream: int, us: int) -> None:
        """Queue a sleep."""
        if self._is_real:
            arguments = ctypes.c_void_p(stream), self._sleep, ctypes.c_void_p(us)
            cuda().call(0, "cuLaunchHostFunc", *arguments)
