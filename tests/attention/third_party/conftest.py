"""Doubles of FlashMLA and DeepGEMM, importable for the time of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from fd_dsa.ops import _third_party
from tests.attention.third_party.kernel_case import Install
from tests.fakes.trees import DEVELOP, installed
from tests.kernel_memory import KernelMemory, open_memory


@pytest.fixture(autouse=True)
def nothing_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package was tried before this test."""
    monkeypatch.setattr(_third_party, "_settled", {})
    monkeypatch.setattr(_third_party, "_told", set())


@pytest.fixture
def memory() -> KernelMemory:
    """Paddle's CPU memory, on which kernels are interpreted."""
    return open_memory("interpreter")


@pytest.fixture
def doubles() -> Iterator[Install]:
    """Makes doubles of the releases named importable, until the test ends."""
    with ExitStack() as stack:

        def install(flash_mla: str = "2026", deep_gemm: str = "2026") -> None:
            tree = replace(DEVELOP, flash_mla=flash_mla, deep_gemm=deep_gemm)
            stack.enter_context(installed(tree, dtype="bfloat16"))

        yield install
