"""Lanes and warps of a program of the step kernel: device time of each choice in a graph.

python -m benchmarks.step_tiles           # what fd_dsa/step/launch.py's constants came from
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from benchmarks import _gpu, _torch_device
from benchmarks.step_metadata import (
    BLOCK_SIZE,
    DECODE_BATCHES,
    MAX_BLOCKS,
    MAX_NUM_SEQS,
    MAX_NUM_TOKENS,
    PREFILL_STEPS,
    allocate,
    decode_rows,
    make_step,
)
from fd_dsa.step.checks import StepLimits
from fd_dsa.step.counts import GivenCounts, check_device_counts
from fd_dsa.step.device import DeviceBuffers
from fd_dsa.step.launch import DECODE_TILE, DECODE_WARPS, MIXED_TILE, MIXED_WARPS, StepLaunch

DECODE = ((32, 1), (64, 1), (64, 2), (128, 4), (256, 8))
MIXED = ((32, 4), (64, 4), (64, 8), (128, 4), (128, 8), (256, 8))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all choices; returns 0."""
    args = _gpu.arguments(__doc__, argv)
    _torch_device.register()
    limits = StepLimits(MAX_NUM_SEQS, MAX_NUM_TOKENS, MAX_BLOCKS, BLOCK_SIZE, None)
    buffers = DeviceBuffers(limits, allocate)
    cases = {f"decode {batch}": decode_rows(batch) for batch in DECODE_BATCHES} | PREFILL_STEPS
    with _gpu.Recorder("step_tiles", args.out) as record:
        for label, rows in cases.items():
            step = make_step(rows, 0)
            counts = check_device_counts(limits, GivenCounts(None, *step.counts.values()))
            has_prefill = counts.num_prefill_tokens > 0
            sides = {}
            for tile, warps in MIXED if has_prefill else DECODE:
                form = {"mixed" if has_prefill else "decode": (tile, warps)}
                launch = StepLaunch(limits, buffers, **form)
                sides[f"{tile} x {warps}"] = [partial(launch, step.tensors, counts)]
            chosen = (MIXED_TILE, MIXED_WARPS) if has_prefill else (DECODE_TILE, DECODE_WARPS)
            times = _gpu.interleaved(sides, mode="graph", rounds=20)
            record.case(label, times, ours="{} x {}".format(*chosen), bytes_moved=step.num_bytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
