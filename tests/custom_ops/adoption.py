"""Builders that take the C ABI of a library, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa import custom_ops
from fd_dsa.triton_runtime import DeviceApi
from tests.kernel_memory import KernelMemory, open_memory


class HostApi(DeviceApi):
    """Tensors in host memory, as device 0 of the library that works there."""

    def device_of(self, tensor: Any) -> int:
        return 0

    def current_stream(self, device: int) -> int:
        return 0


@contextmanager
def adopted(library: Path, monkeypatch: pytest.MonkeyPatch, *, on_gpu: bool) -> Iterator[None]:
    """Builders take the C ABI of a library inside; of one for host memory, unless `on_gpu`."""
    if not on_gpu:
        driver = SimpleNamespace(num_devices=1)
        monkeypatch.setattr("fd_dsa.triton_runtime.c_launch.cuda", lambda: driver)
    custom_ops.use_library(library)
    yield
    custom_ops.use_library(None)


@pytest.fixture(params=[pytest.param("torch", marks=pytest.mark.gpu)])
def memory_of_a_gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelMemory]:
    """Memory of a GPU alone, for kernels that have no form for the host's."""
    from custom_ops.build_library import build_library

    memory = open_memory(request.param)
    with adopted(build_library(), monkeypatch, on_gpu=True):
        yield memory
