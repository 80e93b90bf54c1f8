"""How the results of the V4 preparation and of staged copies are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.benchmarks import results
from tests.benchmarks.results import ENV, percentiles, shown

# microseconds by kind and side, for the first number of drafts; twice and four times for the others
TIMES = {
    "host": {"vectorised": 700.0, "operators": 150.0, "operators, graph": 40.0},
    "exposed": {"vectorised": 450.0},
    "device": {"operators": 120.0, "ours, eager": 12.0, "operators, graph": 30.0},
}
OURS = {"host": 50.0, "exposed": 10.0, "device": 6.0}


def case(kind: str, batch: int, context: int, drafts: int, **changes: float) -> dict[str, Any]:
    factor = {0: 1, 1: 2, 3: 4}[drafts]
    values = {label: factor * us for label, us in TIMES[kind].items()} | {"ours": OURS[kind]}
    values |= changes
    notes: dict[str, Any] = {}
    if kind == "host":
        notes = {"launches": 1, "copies": 1, "host_waits": 0, "allocations": 0}
        notes["stage_and_expand_us"] = percentiles(45.0)
        notes["arrays_us"] = {"vectorised": percentiles(factor * 500.0)}
        notes["effects"] = {"ours": {"launches": 1, "copies": 1}}
    notes |= {"floor_us": 1.0 if kind == "device" else 0.0, "percent_of_floor": 16.0}
    notes |= {"kind": kind, "batch": batch, "context": context, "drafts": drafts}
    name = f"{batch} x {context // 1024}k, MTP {drafts}, {kind}"
    return results.case(name, values, "ours", **notes)


def result(**changes: Any) -> dict[str, Any]:
    cases = [
        case(kind, 128, context, drafts)
        for kind in TIMES
        for context in (8192, 131072)
        for drafts in (0, 1, 3)
    ]
    return results.result("v4_prepare", cases) | changes


def rendered(folder: Path, **changes: Any) -> str:
    return shown(folder, result(**changes))


def test_all_sizes_in_three_tables(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert "| rows x context | vectorised | vectorised, arrays alone | operators |" in text
    assert "| 128 x 8k | 700 / 1,400 / 2,800 | 500 / 1,000 / 2,000 | 150 / 300 / 600 |" in text
    assert "| **ours** | `stage` and `expand` alone | ours, p99 | tier |" in text
    assert "| 50.0 / 50.0 / 50.0 | 45.0 / 45.0 / 45.0 | 60.0 / 60.0 / 60.0 | T1 |" in text
    assert "| **ours** | ours, p99 | of the floor, % | tier |" in text
    assert "| 6.00 / 6.00 / 6.00 | 7.20 / 7.20 / 7.20 | 16.0 / 16.0 / 16.0 | T1 |" in text
    assert text.count("| 128 x 128k |") == 3


def test_where_others_are_faster(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert "- host time, operators, graph: 2 of 6\n" in text
    slow = result()["cases"]
    counted = slow[0] | {"effects": {"ours": {"launches": 1, "copies": 1}}}
    counted["effects"]["vectorised"] = {"launches": 0, "copies": 5}
    text = rendered(tmp_path, cases=[counted, case("exposed", 1, 1024, 3)])
    assert "at 128 x 8k, MTP 0: ours 1 and 1, vectorised 0 and 5." in text
    assert "| 1 x 1k | - / - / 1,800 |" in text
    text = rendered(tmp_path, cases=[case("device", 1, 1024, 0)])
    assert "takes less time than ours:\n\n- none" in text


def staged() -> dict[str, Any]:
    """What the rig writes, for one way to the device."""
    shares = {"median": 1.0, "p5": 1.0, "share_of_steps_above_80": 1.0}
    shares |= {"copy_us": 4.0, "work_us": 2012.0}
    case = {
        "case": "V4Prepare",
        "tier": "T1p",
        "overlap": shares,
        "control": shares | {"median": 0.0},
        "host_waits": 0,
        "copies_a_step": 1.0,
        "bytes_a_step": 5120.0,
        "raced_steps": 10000,
        "wrong_steps": 0,
    }
    return results.result("staging", [case], env=ENV | {"form": "real"})


def test_staged_copies_and_their_control(tmp_path: Path) -> None:
    text = shown(tmp_path, staged())
    row = "| V4Prepare | 1, 5.0 | 4.00 | 2,012 | 100% (100%) | 100% | 0% |"
    assert f"{row} 0 | 0 of 10,000 | T1p |" in text
    assert "without guards" not in text
    cases = [staged()["cases"][0] | {"unguarded": {"no event": 97}, "unguarded_steps": 100}]
    text = shown(tmp_path, staged() | {"cases": cases})
    assert "V4Prepare without guards, steps read wrong of 100: no event: 97." in text
