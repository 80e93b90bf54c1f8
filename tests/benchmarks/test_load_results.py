"""The result of a load: ratios of both sides, merging of commands, and what the pages show."""

from __future__ import annotations

import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks._arrivals import Load
from benchmarks._harness import write_json
from benchmarks._load_results import FIGURES, OURS, PEER, opened, put, refuse_others
from benchmarks.report import plots, region
from tests.benchmarks.results import ENV

SHAPE = {"layers": 7, "dense": 1, "experts": 256, "ranks": 1}
CHAT, SHORT = Load("chat", 8), Load("short", 8)


def result(**changes: Any) -> dict[str, Any]:
    """A result without loads."""
    env = ENV | {"cpu": "EPYC", "cpus": 16}
    fresh = {"name": "load", "env": env, "tier": "T1p", "cases": [], "loads": [], "start_s": {}}
    fresh["target_ms"] = 200.0
    return copy.deepcopy(fresh | SHAPE | changes)


def side(ms: float, *, good: float = 7.0, failed: int = 0, age_s: float = 0.0) -> dict[str, Any]:
    """A side's result in which every latency is `ms`, and its 99th percentile twice that."""
    spread = {"p50": ms, "p99": 2 * ms}
    taken = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - age_s))
    return {
        **dict.fromkeys(("first_token_ms", "token_ms", "gap_ms"), spread),
        "requests": 600,
        "failed": failed,
        "good_per_s": good,
        "tokens_per_s": 900.0,
        "loop_share": 0.25,
        "steps": {"decode graph": 0.75, "graph with prompts": 0.0, "eager": 0.25},
        "taken": {"taken": taken},
    }


@pytest.fixture
def arrivals(tmp_path: Path) -> Path:
    """A file of arrivals."""
    path = tmp_path / "arrivals.json"
    path.write_text("[]")
    return path


def compared(arrivals: Path, ours: Any, peer: Any, **changes: Any) -> dict[str, dict[str, Any]]:
    """The cases of one load by figure."""
    found = result(**changes)
    put(found, CHAT, arrivals, OURS, ours)
    put(found, CHAT, arrivals, PEER, peer)
    return {case["figure"]: case for case in found["cases"]}


def test_a_ratio_above_1_means_that_ours_is_better(arrivals: Path) -> None:
    cases = compared(arrivals, side(10.0, good=6.0), side(15.0, good=4.0))
    assert set(cases) == set(FIGURES)
    assert {case["ratio"] for case in cases.values()} == {1.5}
    first = cases["first token p99"]
    assert (first["case"], first["target"]) == ("chat, 8/s: first token p99", "P35")
    assert (first["ours_value"], first["peer_value"], first["unit"]) == (20.0, 30.0, "ms")
    # the gap has no target
    assert [name for name, case in cases.items() if not case["target"]] == ["gap p99"]


def test_gaps_below_the_target_have_a_ratio_above_1(arrivals: Path) -> None:
    found = result()
    for load, ms in ((CHAT, 80.0), (SHORT, 125.0)):
        put(found, load, arrivals, OURS, side(ms))
    gaps = {one["load"]: (one["p99_ms"], one["ratio"]) for one in found["gaps"]}
    assert gaps == {"chat, 8/s": (160.0, 1.25), "short, 8/s": (250.0, 0.8)}
    assert {one["target_ms"] for one in found["gaps"]} == {200.0}
    # no answer had two tokens
    empty = side(1.0) | {"gap_ms": {"p50": None, "p99": None}}
    put(found, CHAT, arrivals, OURS, empty)
    assert found["gaps"][0]["ratio"] is None


def test_several_gpus_have_a_target_of_their_own(arrivals: Path) -> None:
    cases = compared(arrivals, side(1.0), side(1.0), ranks=4)
    assert cases["good answers"]["target"] == "P36"


@pytest.mark.parametrize(("ours", "peer"), [(0, 3), (3, 0)])
def test_failed_requests_leave_only_the_ratio_of_good_answers(
    arrivals: Path, ours: int, peer: int
) -> None:
    cases = compared(arrivals, side(10.0, failed=ours), side(15.0, failed=peer))
    assert {name for name, case in cases.items() if case["ratio"]} == {"good answers"}
    assert {case["failed"] for case in cases.values()} == {3}


def test_no_good_answer_of_ours_is_a_ratio_of_0(arrivals: Path) -> None:
    assert compared(arrivals, side(9.0, good=0.0), side(9.0))["good answers"]["ratio"] == 0
    assert compared(arrivals, side(9.0), side(9.0, good=0.0))["good answers"]["ratio"] is None


def test_commands_for_parts_of_the_loads_fill_one_file(arrivals: Path, tmp_path: Path) -> None:
    path, first = tmp_path / "load.json", result()
    for load in (SHORT, CHAT):
        put(first, load, arrivals, OURS, side(10.0))
        put(first, load, arrivals, PEER, side(11.0))
    write_json(path, first)
    second = opened(path, result(), is_peer_alone=False)
    # ours again: vLLM's of the earlier run goes
    put(second, CHAT, arrivals, OURS, side(12.0))
    assert [(one["load"], set(one["sides"])) for one in second["loads"]] == [
        ("chat, 8/s", {OURS}),
        ("short, 8/s", {OURS, PEER}),
    ]
    values = [case["ours_value"] for case in second["cases"] if case["figure"] == "gap p99"]
    assert values == [24.0, 20.0]


@pytest.mark.parametrize(
    ("changes", "fits_peer"),
    [
        ({"env": ENV | {"commit": "d" * 40, "cpu": "EPYC"}}, True),
        ({"tier": "dry"}, True),
        ({"experts": 128}, False),
    ],
)
def test_a_file_of_another_run_is_replaced(
    tmp_path: Path, changes: dict[str, Any], fits_peer: bool
) -> None:
    path, fresh = tmp_path / "load.json", result(**changes)
    write_json(path, result(loads=["earlier"]))
    assert opened(path, fresh, is_peer_alone=False)["loads"] == []
    assert bool(opened(path, fresh, is_peer_alone=True)["loads"]) == fits_peer


def test_a_peer_needs_ours_of_the_same_hour_and_arrivals(arrivals: Path, tmp_path: Path) -> None:
    found = result()
    put(found, CHAT, arrivals, OURS, side(10.0))
    refuse_others(found, {CHAT: arrivals})
    other = tmp_path / "other.json"
    other.write_text("[1]")
    put(found, SHORT, arrivals, OURS, side(10.0, age_s=3700))
    for load, path in ((CHAT, other), (SHORT, arrivals), (Load("chat", 24), arrivals)):
        with pytest.raises(SystemExit, match=r"/s: measure ours first"):
            refuse_others(found, {load: path})


def test_the_result_is_plain_json(arrivals: Path) -> None:
    found = result()
    put(found, CHAT, arrivals, OURS, side(10.0))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def measured(folder: Path, arrivals: Path, name: str, *, both: bool = True) -> dict[str, Any]:
    """A written result of three loads, of which the last was measured for ours alone."""
    found = result(name=name)
    for load, peer in ((CHAT, side(15.0)), (SHORT, side(9.0, failed=1)), (Load("short", 24), None)):
        put(found, load, arrivals, OURS, side(10.0))
        if peer and both:
            put(found, load, arrivals, PEER, peer)
    write_json(folder / f"{name}.json", found)
    return found


def test_the_tables_show_both_sides_and_what_failed(arrivals: Path, tmp_path: Path) -> None:
    measured(tmp_path, arrivals, "load")
    text = region("load", tmp_path)
    assert "NVIDIA H200" in text and "7 layers" in text
    assert "| load | first token p50 | first token p99 | time per token p50 |" in text
    # a request of vLLM failed, so its latencies have no ratio
    assert "| chat, 8/s | 10.0, 15.0 (1.50x) | 20.0, 30.0 (1.50x) |" in text
    assert "| short, 8/s | 10.0, 9.00 | 20.0, 18.0 |" in text
    assert "| short, 24/s | 10.0 | 20.0 |" in text
    assert "| chat, 8/s | 90 | 600 | 0 | 0 | 900 | 900 | 75.0% | 0.0% | 25.0% | 25% | 25% |" in text
    assert "| short, 8/s | 90 | 600 | 0 | 1 |" in text


def test_the_page_has_a_picture_once_both_sides_are_measured(
    arrivals: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import picture

    assert region("under_load", tmp_path) == ""
    measured(tmp_path, arrivals, "load", both=False)
    assert region("under_load", tmp_path) == ""
    measured(tmp_path, arrivals, "load")
    measured(tmp_path, arrivals, "load_4")
    assert re.findall(r"on (\w+ GPUs?) .*?\((img/.*?)\)", region("under_load", tmp_path), re.S) == [
        ("one GPU", "img/load.svg"),
        ("four GPUs", "img/load_4.svg"),
    ]
    (path, shown), _ = plots(tmp_path)
    assert path.name == "load.svg"
    (group,) = shown["groups"]
    assert group["relative"] == {
        OURS: 1,
        "vLLM, first token p99": 1.5,
        "vLLM, time per token p50": 1.5,
    }
    assert "20.0 ms, 10.0 ms a token" in picture(shown)


def test_the_headline_has_the_least_and_the_largest_ratio(arrivals: Path, tmp_path: Path) -> None:
    measured(tmp_path, arrivals, "load_8")
    rows = region("headline", tmp_path).splitlines()[2:]
    assert len(rows) == 2 and "`.venv/bin/python -m benchmarks.load -tp 8`" in rows[0]
    assert "| 1.50 to 1.50 | 0 of 5 | NVIDIA H200 |" in rows[0]
    assert "| 1.00 to 1.00 | 0 of 2 | NVIDIA H200 |" in rows[1]
