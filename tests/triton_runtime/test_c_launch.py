"""Launches in a C library: the current stream, the device of the tensors, errors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa.errors import DeviceError
from fd_dsa.triton_runtime import c_launch
from fd_dsa.triton_runtime.c_launch import CLaunch


class Step(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int32),)


class Machine:
    """Devices, streams and a library that notes what is launched where.

    Attributes:
        launched: number in the structure, stream and device of each launch.
    """

    def __init__(self, num_devices: int) -> None:
        self.num_devices, self.device, self.stream, self.answer = num_devices, 0, 7, 0
        self.launched: list[tuple[int, int | None, int]] = []
        self.asked = 0

    def current_device(self) -> int:
        self.asked += 1
        return self.device

    def current_stream(self, device: int) -> int:
        return self.stream

    @contextmanager
    def context(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    def launch(self, argument: Any, stream: ctypes.c_void_p) -> int:
        self.launched.append((argument._obj.number, stream.value, self.device))
        return self.answer


def prepared(
    monkeypatch: pytest.MonkeyPatch, num_devices: int, device: int
) -> tuple[Machine, Step, CLaunch]:
    """A machine and a launch on one of its devices."""
    machine, step = Machine(num_devices), Step(1)
    monkeypatch.setattr(c_launch, "cuda", lambda: machine)

    def text(code: int) -> bytes:
        return b"out of luck"

    library = SimpleNamespace(launch=machine.launch, fd_dsa_cuda_error=text)
    return machine, step, CLaunch(library, "launch", step, machine, device)  # type: ignore[arg-type]


def test_a_call_reads_the_structure_and_the_stream_of_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine, step, launch = prepared(monkeypatch, 1, 0)
    launch()
    step.number, machine.stream = 5, 0
    launch()
    machine.stream = 9
    launch()
    assert machine.launched == [(1, 7, 0), (5, None, 0), (5, 9, 0)]
    # where there is one device, nobody asks which is current
    assert machine.asked == 0


def test_tensors_of_another_device_are_launched_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, _, launch = prepared(monkeypatch, 2, 1)
    launch()
    assert (machine.launched, machine.device) == ([(1, 7, 1)], 0)
    machine.device = 1
    launch()
    assert machine.launched[1:] == [(1, 7, 1)]


def test_a_refused_launch_is_an_error_with_the_runtimes_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine, _, launch = prepared(monkeypatch, 2, 1)
    machine.answer = 400
    with pytest.raises(DeviceError, match="launch: CUDA error 400: out of luck"):
        launch()


def test_a_library_without_the_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1)
    monkeypatch.setattr(c_launch, "cuda", lambda: machine)
    with pytest.raises(AttributeError, match="launch"):
        CLaunch(SimpleNamespace(), "launch", Step(1), machine, 0)  # type: ignore[arg-type]
