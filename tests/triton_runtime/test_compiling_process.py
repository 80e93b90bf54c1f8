"""Runs the tests of compiled launches in a process of their own where this one interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fd_dsa.triton_runtime import INTERPRETING

ROOT = Path(__file__).resolve().parents[2]
COMPILED = ("launch", "bound", "tuning", "warm_up")
pytestmark = [pytest.mark.triton, pytest.mark.slow]


def compiling_environment(cache: Path) -> dict[str, str]:
    """The environment of a process whose kernels are compiled, into this folder."""
    return {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}


@pytest.mark.skipif(not INTERPRETING, reason="the tests run in this process")
def test_compiled(tmp_path: Path) -> None:
    """All of them in one process, which compiles a kernel once."""
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in COMPILED]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=compiling_environment(tmp_path),
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_the_cache_survives_a_restart(tmp_path: Path) -> None:
    for case in ("compile_ahead", "compile_ahead_again"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.triton_runtime.gpu_cases", case],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=compiling_environment(tmp_path),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["fine"]
