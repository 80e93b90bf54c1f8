"""Engines that a process starts one after another, each with kernels of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.null_driver.marks import NULL_DRIVER
from tests.triton_runtime.fakes import run_module

pytestmark = NULL_DRIVER


def test_the_start_of_a_second_engine_is_no_late_compilation(tmp_path: Path) -> None:
    """The first one has ended its warm-up, but it launches nothing meanwhile."""
    pytest.importorskip("paddle")
    printed = run_module(tmp_path, "tests.null_driver.second_engine")
    assert printed == "late compilations: [0, 0]\n"
