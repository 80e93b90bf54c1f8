"""Launches in a C library: the current stream, the device of the tensors, errors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa.errors import DeviceError
from fd_dsa.triton_runtime.c_launch import CLaunch
from fd_dsa.triton_runtime.transfers import Transfers
from tests.triton_runtime.fakes import FakeApi, FakeLibrary, driven_by

pytestmark = pytest.mark.triton


class Step(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int32),)


class Kernels:
    """A library that notes what is launched: number in the structure, stream, context."""

    def __init__(self, driver: FakeLibrary) -> None:
        self.driver, self.answer = driver, 0
        self.launched: list[tuple[int, int | None, int | None]] = []
        self.fd_dsa_cuda_error = lambda code: b"out of luck"

    def launch(self, argument: Any, stream: ctypes.c_void_p) -> int:
        self.launched.append((argument._obj.number, stream.value, self.driver.context()))
        return self.answer


@pytest.fixture(params=[1, 2])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """A library beside a driver of one device, or of two."""
    with driven_by(FakeLibrary(num_devices=request.param)) as driver:
        driver.enter(0x1000)
        yield Kernels(driver)


def test_a_call_reads_the_structure_and_the_stream_of_its_time(kernels: Kernels) -> None:
    step, api = Step(1), FakeApi(stream=7)
    launch = CLaunch(kernels, "launch", step, Transfers(api, 0))
    launch()
    step.number, api.stream = 5, 0
    launch()
    api.stream = 9
    launch()
    assert kernels.launched == [(1, 7, 0x1000), (5, None, 0x1000), (5, 9, 0x1000)]
    kernels.answer = 400
    with pytest.raises(DeviceError, match="launch: CUDA error 400: out of luck"):
        launch()


def test_tensors_of_another_device_are_launched_there() -> None:
    with driven_by(FakeLibrary(num_devices=2)) as driver:
        kernels = Kernels(driver)
        launch = CLaunch(kernels, "launch", Step(1), Transfers(FakeApi(stream=7), 1))
        for before in (0x1000, 0x1001):
            driver.enter(before)
            launch()
            assert driver.context() == before
    assert kernels.launched == [(1, 7, 0x1001)] * 2


def test_a_library_without_the_function_is_refused(kernels: Kernels) -> None:
    with pytest.raises(AttributeError, match="launch"):
        CLaunch(SimpleNamespace(), "launch", Step(1), Transfers(FakeApi(), 0))
