"""The result of a load: ratios of both sides, merging of commands, and what the pages show."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks._arrivals import Load
from benchmarks._harness import write_json
from benchmarks._load_results import FIGURES, OURS, PEER, opened, put, refuse_others
from tests.benchmarks.results import ENV

SHAPE = {"layers": 7, "dense": 1, "experts": 256, "ranks": 1}
CHAT, SHORT = Load("chat", 8), Load("short", 8)


def result(**changes: Any) -> dict[str, Any]:
    """A result without loads."""
    env = ENV | {"cpu": "EPYC", "cpus": 16}
    fresh = {"name": "load", "env": env, "tier": "T1p", "cases": [], "loads": [], "start_s": {}}
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
        "steps": {"decode graph": 0.9, "mixed eager": 0.1},
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
    second = opened(path, result(), of_any_commit=False)
    # ours again: vLLM's of the earlier run goes
    put(second, CHAT, arrivals, OURS, side(12.0))
    assert [(one["load"], set(one["sides"])) for one in second["loads"]] == [
        ("chat, 8/s", {OURS}),
        ("short, 8/s", {OURS, PEER}),
    ]
    values = [case["ours_value"] for case in second["cases"] if case["figure"] == "gap p99"]
    assert values == [24.0, 20.0]


@pytest.mark.parametrize(
    "changes", [{"env": ENV | {"commit": "d" * 40, "cpu": "EPYC"}}, {"layers": 5}, {"tier": "dry"}]
)
def test_a_file_of_another_run_is_replaced(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "load.json"
    write_json(path, result(loads=["earlier"]))
    assert opened(path, result(**changes), of_any_commit=False)["loads"] == []
    assert opened(path, result(**changes), of_any_commit=True)["loads"] == ["earlier"]


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
