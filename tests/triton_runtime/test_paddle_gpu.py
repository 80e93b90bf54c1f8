"""Compiled launches on Paddle tensors in CUDA memory; each case in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.triton_runtime.fakes import run_module

pytestmark = pytest.mark.gpu_rig


@pytest.mark.parametrize("name", ["paddle_without_torch", "paddle_beside_the_compat_guard"])
def test_process(name: str, tmp_path: Path) -> None:
    run_module(tmp_path, "tests.triton_runtime.gpu_cases", name)
