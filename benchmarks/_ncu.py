"""Nsight Compute's report of the subjects, as the entries of a result."""

from __future__ import annotations

import csv
import re
from typing import Any

# raw metric -> how it is called on the page
_SHOWN = {
    "gpu__time_duration.sum": "duration",
    "launch__registers_per_thread": "registers a thread",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy reached",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM, of its peak",
    "lts__t_sector_hit_rate.pct": "L2 hits",
}
# clocks stay as they are; subjects.py marks the calls
FLAGS = (
    *("--clock-control", "none", "--profile-from-start", "off"),
    *("--target-processes", "application-only", "--set", "full", "--csv", "--page", "raw"),
)
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
_STALLS_SHOWN = 4


def kernels(report: str, log: str) -> list[dict[str, Any]]:
    """Return the kernels that ncu saw.

    Args:
        report: printed by `ncu --csv --page raw`.
        log: output of `subjects profile`, which names the subject of every call.

    Returns:
        {"subject": label, "kernel": name, "metrics": {text: "value unit"}, "stalls": {reason:
        ratio}} of each, the largest stalls first: warps that wait in a cycle in which an
        instruction is issued. What the report does not hold is absent, and so are the subjects
        where calls and kernels are not one for one.
    """
    lines = report.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    # the row below the names holds the units
    units, *rows = list(csv.DictReader(lines[start:])) or [{}]
    found: list[dict[str, Any]] = []
    for row in rows:
        ratios = {
            match[1]: float(value.replace(",", ""))
            for name, value in row.items()
            if value and (match := _STALL.fullmatch(name or ""))
        }
        largest = sorted(ratios.items(), key=lambda item: -item[1])[:_STALLS_SHOWN]
        metrics = {
            text: f"{row[name]} {units.get(name, '')}".strip()
            for name, text in _SHOWN.items()
            if row.get(name)
        }
        stalls = {reason: ratio for reason, ratio in largest if ratio > 0}
        found.append({"kernel": row.get("Kernel Name", ""), "metrics": metrics, "stalls": stalls})
    labels = re.findall(r"^subject (.*)$", log, re.MULTILINE)
    if len(labels) == len(found):
        found = [{"subject": label} | kernel for label, kernel in zip(labels, found, strict=True)]
    return found
