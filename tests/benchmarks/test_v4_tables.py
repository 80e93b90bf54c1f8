"""How the results of the V4 preparation and of staged copies are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks._staging_timeline import COPY, EXPAND, WORK, events_of, summary
from benchmarks.report import plots
from tests.benchmarks import results
from tests.benchmarks.results import ENV, percentiles, shown

# microseconds by kind and side, for the first number of drafts; twice and four times for the others
TIMES = {
    "host": {"loop": 700.0, "vectorised": 300.0, "operators": 150.0, "operators, graph": 40.0},
    "exposed": {"loop": 900.0, "vectorised": 450.0, "vectorised, arrays ready": 30.0},
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
        notes["arrays_us"] = {"loop": percentiles(factor * 500.0)}
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
    assert "| rows x context | loop | loop, arrays alone | vectorised |" in text
    assert "| 128 x 8k | 700 / 1,400 / 2,800 | 500 / 1,000 / 2,000 | 300 / 600 / 1,200 |" in text
    assert "| **ours** | `stage` and `expand` alone | ours, p99 | tier |" in text
    assert "| 50.0 / 50.0 / 50.0 | 45.0 / 45.0 / 45.0 | 60.0 / 60.0 / 60.0 | T1 |" in text
    assert "| **ours** | ours, p99 | of the floor, % | tier |" in text
    assert "| 6.00 / 6.00 / 6.00 | 7.20 / 7.20 / 7.20 | 16.0 / 16.0 / 16.0 | T1 |" in text
    assert text.count("| 128 x 128k |") == 3


def test_aims_say_whether_they_are_met(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert (
        "| host time at 128 x 8k, 0 drafts, the loop's against ours: at least 10x | 14.0 | yes |"
        in text
    )
    assert "ours: at least 20x | 6.00 | **no** | T1 |" in text
    assert "at least 50x | 90.0 | yes |" in text
    assert "at least 5x | 10.0 | yes |" in text and "at least 2x | 5.00 | yes |" in text
    assert "launches a step, all sizes: 1 | 1.00 | yes |" in text
    assert "256 x 128k, 3 drafts: at most 12 us | not measured |  |  |" in text
    cases = result()["cases"]
    cases[1] = case("host", 128, 8192, 1, ours=61.0)
    text = rendered(tmp_path, cases=cases, check_us={"p50": 31.0})
    assert "at least 20x | 23.0 | yes |" in text
    assert "at most 25 us | 31.0 | **no** |" in text


def test_where_others_are_faster_is_said(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert "- host time, the loop: none\n" in text
    assert (
        "- host time, the operators in a graph: 128 x 8k (0 drafts), 128 x 128k (0 drafts)\n"
        in text
    )
    small = [case("host", 1, 1024, drafts, loop=30.0) for drafts in (0, 1)]
    small[0]["arrays_us"]["loop"] = percentiles(9.0)
    text = rendered(tmp_path, cases=small)
    assert "- host time, the loop: all\n" in text
    assert "without a copy to the device, against our host time: 1 x 1k (0 drafts)\n" in text


def test_table_mode_and_counts(tmp_path: Path) -> None:
    table = case("device", 128, 1 << 20, 3) | {
        "kind": "table",
        "case": "128 x 1024k, MTP 3, table",
        "host_us": percentiles(40.0),
        "allocated_bytes": 20 << 20,
        "list_bytes": 33 << 20,
    }
    counted = case("host", 128, 8192, 1)
    counted["effects"]["loop"] = {"launches": 0, "copies": 18}
    text = rendered(tmp_path, cases=[counted, table])
    assert "In table mode, at 128 x 1024k, MTP 3, no list is written: the launch takes 6.00" in text
    assert "20.0 MiB, where the list alone would have 33.0 MiB" in text
    assert "at 128 x 8k, MTP 1: ours 1 and 1, loop 0 and 18." in text


def trace(copy_at: float, steps: int = 12) -> list[dict[str, Any]]:
    """Steps of 200 us of work in two kernels, an expansion, and one copy of 4 us."""
    events = []
    for step in range(steps):
        begin = 210.0 * step
        events += [
            {"cat": "kernel", "name": "gemm", "ts": begin, "dur": 99.0},
            {"cat": "kernel", "name": "gemm", "ts": begin + 100, "dur": 100.0},
            {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": begin + copy_at, "dur": 4.0},
            {"cat": "kernel", "name": "expand_kernel", "ts": begin + 204, "dur": 5.0},
            {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": begin, "dur": 3.0},
        ]
    return events


@pytest.mark.parametrize(("copy_at", "share"), [(40.0, 1.0), (97.0, 1.0), (198.0, 0.5), (203, 0.0)])
def test_how_much_of_a_copy_lies_beside_work(copy_at: float, share: float) -> None:
    found = summary(events_of(trace(copy_at)), 12)
    assert (found["copies"], found["median"], found["p5"]) == (1, share, share)
    assert found["share_of_steps_above_80"] == (share >= 0.8)
    events = found["timeline"]
    assert [event["name"] for event in events].count(COPY) == (2 if copy_at > 200 else 3)
    ends = [event["start_us"] + event["us"] for event in events if event["name"] == WORK]
    assert ends == [-311.0, -210.0, -101.0, 0.0, 109.0, 210.0]
    assert {event["stream"] for event in events if event["name"] == EXPAND} == {0}


def test_copies_that_do_not_fit_the_steps() -> None:
    with pytest.raises(ValueError, match="12 copies in 7 steps"):
        summary(events_of(trace(40.0)), 7)


def staged() -> dict[str, Any]:
    """What the rig writes, for one way to the device."""
    sides = {"staged": 40.0, "copies wait": 203.0}
    found = {label: summary(events_of(trace(at)), 12) for label, at in sides.items()}
    shares = [each | {"copy_us": 4.0, "work_us": 2012.0} for each in found.values()]
    case = {
        "case": "V4Prepare",
        "tier": "T1p",
        "overlap": shares[0],
        "control": shares[1],
        "host_us": {"stage_p50": 20.0, "stage_p99": 31.5, "expand_p50": 8.0, "expand_p99": 9.0},
        "host_waits": 0,
        "copies_a_step": 1.0,
        "bytes_a_step": 5120.0,
        "raced_steps": 10000,
        "wrong_steps": 0,
    }
    timeline = {label: each["timeline"] for label, each in found.items()}
    return results.result("staging", [case], env=ENV | {"form": "real"}, timeline=timeline)


def test_staged_copies_and_their_control(tmp_path: Path) -> None:
    text = shown(tmp_path, staged())
    row = "| V4Prepare | 1, 5.0 | 4.00 | 2,012 | 100% (100%) | 100% | 0% | 20.0 (31.5) |"
    assert f"{row} 8.00 (9.00) | 0 | 0 of 10,000 | T1p |" in text
    assert "img/staging.svg" in text and "without guards" not in text
    assert [path.name for path, _ in plots(tmp_path)] == ["staging.svg"]
    cases = [staged()["cases"][0] | {"unguarded": {"no event": 97}, "unguarded_steps": 100}]
    text = shown(tmp_path, staged() | {"cases": cases})
    assert "V4Prepare without guards, steps read wrong of 100: no event: 97." in text


def test_the_timeline_of_copies_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import digest, picture

    svg = picture(staged())
    assert digest(staged()) in svg
    for text in ("staged, main", "staged, second", "copies wait, second", COPY, EXPAND, WORK):
        assert text in svg
