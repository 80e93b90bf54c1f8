"""Launches on memory that Paddle returned to the driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.null_driver.marks import NULL_DRIVER
from tests.triton_runtime.fakes import run_module

pytestmark = NULL_DRIVER


def test_memory_that_the_host_has_now_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("paddle")
    printed = run_module(tmp_path, "tests.null_driver.freed_memory")
    assert "3 launches" in printed
    assert "the tensor is on Place(cpu)" in printed
