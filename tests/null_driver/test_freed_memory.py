"""Launches on memory that Paddle returned to the driver."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.triton_runtime.fakes import run_module

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]


def test_memory_that_the_host_has_now_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("paddle")
    printed = run_module(tmp_path, "tests.null_driver.freed_memory")
    assert "3 launches" in printed
    assert "the tensor is on Place(cpu)" in printed
