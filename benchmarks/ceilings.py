"""Ceilings of the GPU and its driver: copies, graph nodes, raw launches."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import _gpu

_SOURCE = Path(__file__).with_suffix(".cu")


def raw_costs() -> dict[str, float]:
    """Return host microseconds of raw launches with 1, 5 and 18 arguments, and of a graph's node.

    Raises:
        RuntimeError: nvcc or the program failed; its words are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        build = ["nvcc", "-O2", "-std=c++17", "-arch=sm_90", "-o", str(program), str(_SOURCE)]
        for command in (build, [str(program)]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise RuntimeError(f"{command[0]}: {done.stderr[-300:]}")
    return json.loads(done.stdout)


def matrix_flops_per_s() -> float:
    """Return rate of a bfloat16 GEMM of random 8192 x 8192 matrices."""
    out = torch.empty(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return _gpu.gemm_flops_per_s(torch.bfloat16, partial(torch.mm, out=out))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write ceilings.json."""
    args = _gpu.arguments(__doc__, argv)
    with _gpu.Recorder("ceilings", args.out) as record:
        record.note(matrix_flops_per_s=matrix_flops_per_s())
        costs = raw_costs()
        record.note(**costs)
    print(f"copy {record.ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, raw costs in us: {costs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
