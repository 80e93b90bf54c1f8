"""Programs in processes with one order of sums from their start, as servers have it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def check_equal_bits(program: str, *arguments: str) -> None:
    """Run a program with FD_DSA_BATCH_INVARIANT=1, which prints "equal" if all bits are.

    A matrix library reads its variables once, so the program needs a process of its own. The test
    is skipped if the library keeps no order on this processor, which the engine then says.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        env={**os.environ, "FD_DSA_BATCH_INVARIANT": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if "got 1, but on this machine" in done.stderr:
        pytest.skip("the matrix library keeps no order on this processor, and the engine says so")
    assert done.stdout.strip() == "equal", done.stderr[-4000:]
