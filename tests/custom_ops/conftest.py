"""The operators as users get them, and memories in which kernels are called by their C ABI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fd_dsa import custom_ops
from tests.custom_ops.building import emulated_library, load_package
from tests.kernel_memory import KernelMemory, open_memory

ON_GPU = pytest.param("torch", marks=pytest.mark.gpu)
ON_RIG = pytest.param("rig", marks=pytest.mark.gpu_rig)
EMULATED = pytest.param("interpreter", marks=pytest.mark.triton)


@pytest.fixture(scope="session")
def ops() -> Any:
    """The package fd_dsa_ops, built beside Paddle's CPU wheel."""
    return load_package()


def _memory(request: pytest.FixtureRequest, patch: pytest.MonkeyPatch) -> Iterator[KernelMemory]:
    """A memory for the kernels of the module's KERNELS: emulated on the CPU, or on a GPU."""
    memory = open_memory(request.param)
    if memory.on_gpu:
        from custom_ops.build_library import build_library

        library = build_library()
    else:
        library = emulated_library(request.module.KERNELS)
        # kernels on emulated threads count as compiled ones
        patch.setattr("fd_dsa.ops._library.INTERPRETING", False)
    custom_ops.use_library(library)
    yield memory
    custom_ops.use_library(None)


@pytest.fixture(params=[EMULATED, ON_GPU])
def kernel_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelMemory]:
    """Memory in which the kernels of this module are called: of the CPU, or of a GPU."""
    yield from _memory(request, monkeypatch)


@pytest.fixture(params=[EMULATED, ON_RIG])
def paddle_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelMemory]:
    """As `kernel_memory`, for operators that make their results by Paddle."""
    yield from _memory(request, monkeypatch)


@pytest.fixture(params=[EMULATED])
def emulated_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelMemory]:
    """Memory of the CPU alone, for what cannot be asked of a GPU."""
    yield from _memory(request, monkeypatch)


@pytest.fixture(params=[ON_GPU])
def gpu_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelMemory]:
    """Memory of a GPU alone, for sizes that emulated threads would take too long for."""
    yield from _memory(request, monkeypatch)
