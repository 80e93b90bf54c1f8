"""The places where steps are built: one run of a test for each."""

from __future__ import annotations

import pytest

from tests.conftest import MEMORIES
from tests.kernel_memory import open_memory
from tests.step.helpers import Place

MARKED = [pytest.param(name, marks=getattr(pytest.mark, kind)) for name, kind in MEMORIES.items()]


@pytest.fixture(params=["numpy", "cpu", *MARKED])
def place(request: pytest.FixtureRequest) -> Place:
    """Host memory with and without Paddle, and the memories of kernels."""
    name = request.param
    return Place(name, None if name in ("numpy", "cpu") else open_memory(name))
