"""The operators as users get them, and memories whose steps are built by their kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.custom_ops.adoption import adopted
from tests.custom_ops.building import host_library, load_package

MEMORIES = {"interpreter": "triton", "torch": "gpu"}


@pytest.fixture(scope="session")
def ops() -> Any:
    """The package fd_dsa_ops, built beside Paddle's CPU wheel."""
    return load_package()


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
    with adopted(library, monkeypatch, on_gpu=memory.on_gpu):
        yield memory
