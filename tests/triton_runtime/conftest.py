"""A driver that takes notes, instead of CUDA's, and what it reports of its devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fd_dsa.triton_runtime
from fd_dsa.triton_runtime import INTERPRETING, kernel, register_device_api
from tests.triton_runtime.fakes import FakeApi, FakeLibrary, FakeTensor, driven_by, fake_compile


@pytest.fixture
def api() -> FakeApi:
    """Register the facts of fake tensors that the launcher asks for."""
    api = FakeApi()
    register_device_api(FakeTensor, api)
    return api


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched as compiled ones; where this process interprets, nothing is compiled."""
    if INTERPRETING:
        for module in (fd_dsa.triton_runtime, kernel):
            monkeypatch.setattr(module, "INTERPRETING", False)
        monkeypatch.setattr(kernel, "compile_kernel", fake_compile)


@pytest.fixture
def library(api: FakeApi, compiling: None) -> Iterator[FakeLibrary]:
    """The driver library of one test; it reads the arguments of `scale_kernel`."""
    with driven_by(FakeLibrary(codes="QQif?i")) as library:
        yield library
