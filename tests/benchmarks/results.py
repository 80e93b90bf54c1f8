"""Results as the GPU benchmarks record them, made up for the tests of how they are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._harness import write_json
from benchmarks.report import region

ENV: dict[str, Any] = {
    "date": "2026-01-02",
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "c" * 40,
    "dirty": False,
}


def percentiles(p50: float) -> dict[str, float]:
    return {"p20": p50 * 0.99, "p50": p50, "p80": p50 * 1.01, "p99": p50 * 1.2}


def case(name: str, us: dict[str, float], ours: str, **notes: Any) -> dict[str, Any]:
    """A case whose sides take these microseconds, ours twice the floor."""
    found = {
        "case": name,
        "tier": "T1",
        "times": {label: percentiles(value) for label, value in us.items()},
        "ours": ours,
        "ratios": {label: value / us[ours] for label, value in us.items() if label != ours},
        "floor_us": us[ours] / 2,
        "percent_of_floor": 50.0,
    }
    return found | notes


def result(name: str, cases: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    found = {
        "name": name,
        "env": ENV,
        "gate": "passed",
        "clocks": [],
        "ceilings": {"copy_bytes_per_s": 4.2e12, "node_us": 0.5},
        "cases": cases,
    }
    return found | changes


def shown(folder: Path, result: dict[str, Any]) -> str:
    """Return the text that the page shows of a result."""
    write_json(folder / f"{result['name']}.json", result)
    return region(result["name"], folder)
