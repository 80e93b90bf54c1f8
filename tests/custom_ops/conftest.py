"""The operators as users get them, and memories whose steps are built by their kernels."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa import custom_ops
from fd_dsa.triton_runtime import DeviceApi
from tests.custom_ops.building import host_library, load_package

MEMORIES = {"interpreter": "triton", "torch": "gpu"}


@pytest.fixture(scope="session")
def ops() -> Any:
    """The package fd_dsa_ops, built beside Paddle's CPU wheel."""
    return load_package()


class HostApi(DeviceApi):
    """Tensors in host memory, as device 0 of the library that works there."""

    def device_of(self, tensor: Any) -> int:
        return 0

    def current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(
    params=[pytest.param(m, marks=getattr(pytest.mark, k)) for m, k in MEMORIES.items()]
)
def kernel_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A memory in which builders take the C ABI: of host code, or of kernels on a GPU."""
    from tests.kernel_memory import open_memory

    memory = open_memory(request.param)
    if memory.on_gpu:
        from custom_ops.build_library import build_library

        library = build_library()
    else:
        library = host_library()
        monkeypatch.setattr("fd_dsa.step.probe.INTERPRETING", False)
        monkeypatch.setattr("fd_dsa.step.custom_op.api_for_type", lambda kind: HostApi())
        driver = SimpleNamespace(num_devices=1)
        monkeypatch.setattr("fd_dsa.triton_runtime.c_launch.cuda", lambda: driver)
    custom_ops.use_library(library)
    yield memory
    custom_ops.use_library(None)
