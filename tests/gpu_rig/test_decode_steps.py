"""The command that times decode steps, with workers that answer from a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks._harness import write_json
from tests.demo.samples import LEADING_PROMPTS
from tests.gpu_rig import decode_steps
from tests.gpu_rig.decode_worker import CPU, GRAPH

TOKENS = [[[n + i, 1.0] for i in range(3)] for n in range(len(LEADING_PROMPTS))]


class Answers:
    """Stands for a worker; `broken` is what the graphs of this test cannot do."""

    broken = ""
    tokens = TOKENS

    def __init__(self, module: str, way: str, *options: str) -> None:
        self.way, self.is_open = way, True

    def call(self, op: str, **request: Any) -> Any:
        if self.way == GRAPH and op == self.broken:
            raise RuntimeError("worker ended with status 134")
        if op == "facts":
            return {"captured": [], "custom_ops": {}}
        if op == "tokens":
            return TOKENS if self.way == CPU else self.tokens
        us = 1e3 if self.way == GRAPH else 4e3
        times = {"step_us": [us] * 3, "runner_us": [us / 2] * 3}
        return times | {"counted": {"h2d_async": 1, "h2d_bytes": 99, "event_syncs": 1}}

    def close(self) -> None:
        self.is_open = False


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> type[Answers]:
    kind = type("Kind", (Answers,), {})
    monkeypatch.setattr(decode_steps, "Worker", kind)
    return kind


def measured(folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit status and result of a run."""
    status = decode_steps.main(
        ["--out", str(folder), "--max-tokens", "3", "--rows", "1", "2", *flags]
    )
    return status, json.loads((folder / "decode_steps.json").read_text())


def test_both_ways_in_turn(answers: type[Answers], tmp_path: Path) -> None:
    kept = tmp_path / "cpu.json"
    status, found = measured(tmp_path, "--cpu-tokens", str(kept))
    assert status == 0 and found["gate"] == "passed"
    assert [case["case"] for case in found["cases"]] == [
        "1 x 128",
        "1 x 1024",
        "2 x 128",
        "2 x 1024",
    ]
    assert found["cases"][0]["ratios"] == {"eager": 4.0}
    assert json.loads(kept.read_text()) == TOKENS
    # what is kept is not asked for again, unless it is too short
    write_json(kept, [[[7, 1.0], [8, 1.0], [9, 1.0]] for _ in TOKENS])
    status, found = measured(tmp_path, "--cpu-tokens", str(kept))
    assert status == 1 and "prompt 0: token 0 of 3 is another" in found["tokens"]["eager"]


@pytest.mark.parametrize("broken", ["facts", "tokens", "steps"])
def test_graphs_that_fail_leave_eager_steps(
    answers: type[Answers], tmp_path: Path, broken: str
) -> None:
    answers.broken = broken
    status, found = measured(tmp_path, "--contexts", "128")
    assert status == 1 and found["failed"] == {"graph": "worker ended with status 134"}
    assert [list(case["times"]) for case in found["cases"]] == [["eager"]] * 2
    assert found["cases"][0]["ours"] == "eager" and not found["cases"][0]["ratios"]


def test_other_tokens_are_no_result(answers: type[Answers], tmp_path: Path) -> None:
    answers.tokens = [*TOKENS[:-1], [[4, 1.0], [5, 1.0], [7, 1.0]]]
    status, found = measured(tmp_path)
    assert status == 1 and found["gate"] == "failed"
    assert "prompt 4: token 2 of 3" in found["tokens"]["graph"]
    assert "No figures." in report.region("decode_steps", tmp_path)


def test_a_token_that_hardly_leads_may_be_another_and_so_may_what_follows() -> None:
    wanted = [[(3, 0.9), (4, 0.049), (5, 0.9)]]
    assert not decode_steps.agreement([[(3, 0.9), (6, 0.02), (7, 0.9)]], wanted)
    assert "token 0 of 3" in decode_steps.agreement([[(6, 0.01), (4, 0.1), (5, 0.9)]], wanted)
    wanted = [[(3, 0.9), (4, 0.051), (5, 0.9)]]
    assert "token 1 of 3" in decode_steps.agreement([[(3, 0.9), (6, 0.02), (7, 0.9)]], wanted)


def test_how_it_is_shown(answers: type[Answers], tmp_path: Path) -> None:
    _, found = measured(tmp_path, "--contexts", "128")
    found["env"] |= {"dirty": False, "gpu": "NVIDIA H200", "commit": "c" * 40}
    write_json(tmp_path / "decode_steps.json", found)
    text = report.region("decode_steps", tmp_path)
    assert "| 1 x 128 | 4,000 (4.00x) | **1,000** | 2,000 | 500 | T1p |" in text
    assert "A step, graph, at most: 1 event syncs, 1 h2d async." in text
