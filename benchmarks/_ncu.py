"""Nsight Compute's report of a kernel, as a few lines of text."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from typing import Any

# raw metric -> how it is called in the text
_SHOWN = {
    "gpu__time_duration.sum": "duration",
    "launch__grid_size": "grid",
    "launch__block_size": "threads a block",
    "launch__registers_per_thread": "registers a thread",
    "launch__shared_mem_per_block_dynamic": "shared memory a block",
    "launch__waves_per_multiprocessor": "waves",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy reached",
    "sm__maximum_warps_per_active_cycle_pct": "occupancy possible",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM, of its peak",
    "dram__bytes_read.sum": "DRAM read",
    "dram__bytes_write.sum": "DRAM written",
    "lts__t_bytes.sum": "L2 traffic",
    "lts__t_sector_hit_rate.pct": "L2 hits",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM, of its peak",
}
# clocks stay as they are; subjects.py marks the calls; L2 bytes are in no set
FLAGS = (
    *[
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--target-processes",
        "application-only",
    ],
    *["--set", "full", "--metrics", "lts__t_bytes.sum", "--csv", "--page", "raw"],
)
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
_STALLS_SHOWN = 4


def kernels(raw: str) -> Iterator[dict[str, Any]]:
    """Kernels of a report printed by `ncu --csv --page raw`.

    Yields:
        {"kernel": name, "metrics": {text: "value unit"}, "stalls": {reason: ratio}}, the stalls
        by size; what the report does not hold is absent.
    """
    lines = raw.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(lines[start:]))
    if not rows:
        return
    # the row below the names holds the units
    units, *found = rows
    for row in found:
        yield {
            "kernel": row.get("Kernel Name", ""),
            "metrics": {
                text: f"{row[name]} {units.get(name, '')}".strip()
                for name, text in _SHOWN.items()
                if row.get(name)
            },
            "stalls": _stalls(row),
        }


def _stalls(row: Mapping[str, str]) -> dict[str, float]:
    """Largest reasons why a warp waits, warps a cycle in which an instruction is issued."""
    ratios = {}
    for name, value in row.items():
        match = _STALL.fullmatch(name or "")
        if match and value:
            ratios[match[1]] = float(value.replace(",", ""))
    largest = sorted(ratios.items(), key=lambda item: -item[1])[:_STALLS_SHOWN]
    return {reason: ratio for reason, ratio in largest if ratio > 0}


def text(kernel: Mapping[str, Any]) -> str:
    """One kernel in a few lines."""
    shown = "; ".join(f"{name} {value}" for name, value in kernel["metrics"].items())
    stalls = ", ".join(f"{reason} {ratio:.1f}" for reason, ratio in kernel["stalls"].items())
    return f"{kernel.get('subject', '')} {kernel['kernel']}\n    {shown}\n    stalls: {stalls}"
