"""Launches in a C library: the current stream, the device of the tensors, errors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa.errors import BackendUnavailable, DeviceError
from fd_dsa.ops.library_kernel import LibraryKernel
from fd_dsa.triton_runtime import compile_ahead, register_device_api
from tests.triton_runtime.fakes import FakeApi, FakeLibrary, FakeTensor, driven_by

pytestmark = pytest.mark.triton


class Step(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int32),)


class Launch(LibraryKernel):
    """Launches with a number on a device."""

    launcher, size, structure = "launch", "size", Step

    def __call__(self, number: int, device: int = 0) -> None:
        self.bind(FakeTensor(0x7000, device=device))
        self.job.number = number
        self.launch()


class Kernels:
    """A library that notes what is launched: number in the structure, stream, context."""

    def __init__(self, driver: FakeLibrary) -> None:
        self.driver, self.answer = driver, 0
        self.launched: list[tuple[int, int | None, int | None]] = []
        self.size = lambda: ctypes.sizeof(Step)
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


def test_nothing_is_launched_on_results_that_are_missing(kernels: Kernels) -> None:
    launch = Launch(kernels)
    register_device_api(FakeTensor, FakeApi())
    with compile_ahead(1):
        launch(1)
    assert not kernels.launched
    launch(2)
    assert [number for number, *_ in kernels.launched] == [2]


def test_a_call_reads_the_structure_and_the_stream_of_its_time(kernels: Kernels) -> None:
    launch, api = Launch(kernels), FakeApi()
    register_device_api(FakeTensor, api)
    for number, api.stream in ((1, 7), (5, 0), (5, 9)):
        launch(number)
    assert kernels.launched == [(1, 7, 0x1000), (5, None, 0x1000), (5, 9, 0x1000)]
    kernels.answer = 400
    with pytest.raises(DeviceError, match="launch: CUDA error 400: out of luck"):
        launch(5)


def test_tensors_of_another_device_are_launched_there() -> None:
    register_device_api(FakeTensor, FakeApi(stream=7))
    with driven_by(FakeLibrary(num_devices=2)) as driver:
        kernels = Kernels(driver)
        launch = Launch(kernels)
        for before in (0x1000, 0x1001):
            driver.enter(before)
            launch(1, device=1)
            assert driver.context() == before
    assert kernels.launched == [(1, 7, 0x1001)] * 2


def test_a_library_without_the_function_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="launch expects another structure"):
        Launch(SimpleNamespace())
