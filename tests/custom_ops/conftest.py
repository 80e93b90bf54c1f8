"""The operators as users get them, and memories in which kernels are called by their C ABI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fd_dsa import custom_ops
from tests.custom_ops.building import emulated_library, faulty_library, load_package
from tests.kernel_memory import KernelMemory, open_memory

ON_GPU = pytest.param("torch", marks=pytest.mark.gpu)
ON_RIG = pytest.param("rig", marks=pytest.mark.gpu_rig)
EMULATED = pytest.param("interpreter", marks=pytest.mark.triton)


@pytest.fixture(scope="session")
def ops() -> Any:
    """The package fd_dsa_ops, built beside Paddle's CPU wheel."""
    return load_package()


def _memories(*params: Any) -> Any:
    """A fixture of memories for the kernels of the module's KERNELS."""

    @pytest.fixture(params=params)
    def memories(
        request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[KernelMemory]:
        memory = open_memory(request.param)
        if memory.on_gpu:
            from custom_ops.build_library import build_library

            library = build_library()
        else:
            library = emulated_library(request.module.KERNELS)
            # kernels on emulated threads count as compiled ones
            monkeypatch.setattr("fd_dsa.ops.library_kernel.INTERPRETING", False)
        custom_ops.use_library(library)
        yield memory
        custom_ops.use_library(None)

    return memories


kernel_memory = _memories(EMULATED, ON_GPU)
# for operators that make their results by Paddle
paddle_memory = _memories(EMULATED, ON_RIG)
# for what cannot be asked of a GPU
emulated_memory = _memories(EMULATED)
# for sizes that emulated threads would take too long for
gpu_memory = _memories(ON_GPU)


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Callable[..., int]], list[int]]:
    """Function that lists a number for each call of a type of kernel, made of its arguments."""

    def count(kind: Any, number: Callable[..., int]) -> list[int]:
        calls, call = list[int](), kind.__call__

        def counted(self: Any, *given: Any, **options: Any) -> None:
            calls.append(number(*given))
            call(self, *given, **options)

        monkeypatch.setattr(kind, "__call__", counted)
        return calls

    return count


@pytest.fixture
def hopper_memory(paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch) -> KernelMemory:
    """`paddle_memory` for kernels of Hopper, which emulated threads count as."""
    from fd_dsa.ops import library_kernel

    if not paddle_memory.on_gpu:
        monkeypatch.setattr(library_kernel, "unsupported_reason", lambda tensor: "")
    elif reason := library_kernel.unsupported_reason(paddle_memory.poisoned((1,), "uint8")):
        pytest.skip(reason)
    return paddle_memory


@pytest.fixture
def assert_fault_shows(
    request: pytest.FixtureRequest,
    emulated_memory: KernelMemory,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., None]:
    """Function that asserts that a check passes, and fails with a fault in the module's KERNELS."""
    from fd_dsa.ops import library_kernel

    monkeypatch.setattr(library_kernel, "unsupported_reason", lambda tensor: "")

    def assert_shows(
        check: Callable[[KernelMemory], None], file: str, right: str, wrong: str
    ) -> None:
        check(emulated_memory)
        library = faulty_library(request.module.KERNELS, tmp_path, file, right, wrong)
        custom_ops.use_library(library)
        with pytest.raises(AssertionError):
            check(emulated_memory)

    return assert_shows
