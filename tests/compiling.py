"""Scripts that compile kernels, in processes where Triton compiles and does not interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

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


def is_serialized(ptx: str) -> bool:
    """Return True if each wgmma instruction of Hopper waits for the one before it.

    Such a kernel lacks registers, and runs at a tenth of the rate of the tensor cores. Only the log
    of ptxas says so.
    """
    if "wgmma" not in ptx:
        return False
    import triton

    log = ""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        # the first one refuses the PTX of Triton 3.9, which uses the second one for every GPU
        for tool in ("ptxas", "ptxas-blackwell"):
            path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
            command = [path, "-v", "-arch=sm_90a", source, "-o", source.with_suffix(".cubin")]
            done = subprocess.run(command, capture_output=True, text=True)
            log += done.stdout + done.stderr
            if done.returncode == 0:
                return "are serialized" in log
    raise AssertionError(log)
