"""Scripts that compile kernels, in processes where Triton compiles and does not interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def output_of(script: str, *arguments: str) -> str:
    """Return the output of a script that needs no GPU. A failure shows the output's end."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
