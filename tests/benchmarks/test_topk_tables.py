"""How the result of the top-k is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._harness import write_json
from benchmarks.report import plots, region

ENV = {"gpu": "NVIDIA H200", "driver": "580.1", "python": "3.12.3", "commit": "c" * 40}
ENV |= {"dirty": False}


def case(rows: int, width: int, same: float, best: float, **right: float) -> dict[str, Any]:
    times = {"FlashInfer low": 10 * same, "torch": 10 * best, "~fast": 9.0, "custom op": 10.0}
    return {
        "case": f"{rows} x {width}k",
        "tier": "T1",
        "times": {label: {"p20": us, "p50": us, "p80": us} for label, us in times.items()},
        "ours": "custom op",
        "ratios": {label: us / 10 for label, us in times.items() if label != "custom op"},
        "floor_us": 1.0,
        "percent_of_floor": 10.0,
        "rows": rows,
        "width": width << 10,
        "ratio_same_rule": same,
        "ratio_best_exact": best,
        "share_right": {f"~{label}": share for label, share in right.items()},
    }


def rendered(folder: Path, **changes: Any) -> str:
    cases = [
        case(1, 4, 1.2, 0.9),
        case(1, 16, 2.0, 1.6, fast=0.999),
        case(32, 32, 1.8, 1.55, fast=0.9),
        case(64, 64, 1.9, 1.7, fast=0.95),
    ]
    result = {
        "name": "topk",
        "env": ENV,
        "gate": "passed",
        "clocks": [],
        "ceilings": {"copy_bytes_per_s": 4.2e12, "node_us": 0.5},
        "same_rule": "FlashInfer low",
        "cases": cases,
    }
    write_json(folder / "topk.json", result | changes)
    return region("topk", folder)


def test_least_ratios_and_what_others_miss(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert "| 32 x 32k | 18.0 (1.80x) | 15.5 (1.55x) | 9.00 (0.90x) | **10.0** | 10% | T1 |" in text
    assert (
        "our rule for equal scores (FlashInfer low) is: everywhere at least 1.20 (1 x 4k), at 32 "
        "rows and more of 32k and more at least 1.80 (32 x 32k), at one row of 16k and more at "
        "least 2.00 (1 x 16k)."
    ) in text
    assert "the fastest exact peer of each case is: everywhere at least 0.90 (1 x 4k), " in text
    assert "not among the best: ~fast up to 10.0% (32 x 32k)." in text
    assert list(plots(tmp_path)) == []


def test_nothing_without_green_tests(tmp_path: Path) -> None:
    text = rendered(tmp_path, gate="failed")
    assert "No figures." in text and "at least" not in text
