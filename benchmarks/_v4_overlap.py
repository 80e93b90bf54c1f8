"""Whether a step's copies run beside the work of the step before, from a trace of the profiler."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks._gpu import Call
from benchmarks._staging_timeline import events_of, summary
from benchmarks._v4_sides import Side
from benchmarks._v4_steps import Decode


def overlap_of(side: Side, decode: Decode, work: Call, steps: int) -> dict[str, Any]:
    """How much of each step's copies lies under the work of the steps; see `summary`.

    Args:
        side: its preparation of each step is queued between two steps' work.
        work: queues the work of one step on the current stream.
        steps: steps that are traced.
    """
    side.start()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(side, decode, work, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return summary(events_of(json.loads(path.read_text())["traceEvents"]), steps)


def run(side: Side, decode: Decode, work: Call, steps: int) -> None:
    """Queue steps, the host one step ahead, and wait for the last one."""
    behind = torch.cuda.Event()
    behind.record()
    for _ in range(steps):
        grown = decode.advance()
        work()
        side.stage(decode, grown)
        side.finish(decode)
        behind.synchronize()
        behind = torch.cuda.Event()
        behind.record()
    torch.cuda.synchronize()
