"""The command that times decode steps: what it writes, and how that is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks._harness import write_json
from tests.gpu_rig import decode_steps
from tests.gpu_rig.decode_steps import EAGER, GRAPH


class FakeLLM:
    """An engine that is opened and closed, and answers with tokens."""

    def __init__(self, way: str, tokens: list[list[int]]) -> None:
        self.way, self.tokens, self.runner = way, tokens, self

    def _open_engine(self) -> Any:
        return self

    def close(self) -> None:
        self.way = "closed"


def measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, graph_tokens: list[list[int]]
) -> tuple[int, dict[str, Any]]:
    """Exit status and result of a run with engines that answer from a table."""
    rig = type("Rig", (), {"is_real": False})()
    tokens = {EAGER: [[1, 2]], GRAPH: graph_tokens}

    def timed(rig: Any, llm: FakeLLM, *sizes: int) -> dict[str, Any]:
        us = {GRAPH: 1e3, EAGER: 4e3}[llm.way]
        times = {"step_us": [us] * 3, "runner_us": [us / 2] * 3}
        return times | {"counted": {"h2d_async": 1, "h2d_bytes": 99, "event_syncs": 1}}

    monkeypatch.setattr(decode_steps, "load", lambda form: rig)
    monkeypatch.setattr(
        decode_steps, "open_engine", lambda _, way, *sizes: FakeLLM(way, tokens[way])
    )
    monkeypatch.setattr(decode_steps, "greedy", lambda llm, *rest: llm.tokens)
    monkeypatch.setattr(decode_steps, "timed_steps", timed)
    status = decode_steps.main(["--out", str(folder), "--rows", "1", "2", "--contexts", "128"])
    found = json.loads((folder / "decode_steps.json").read_text())
    found["env"] |= {"dirty": False, "gpu": "NVIDIA H200", "driver": "580.1", "commit": "c" * 40}
    found["env"]["form"] = "real"
    write_json(folder / "decode_steps.json", found)
    return status, found


def test_both_ways_in_turn_and_how_they_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path /= "new"
    status, found = measured(tmp_path, monkeypatch, [[1, 2]])
    assert status == 0 and found["gate"] == "passed"
    assert [case["case"] for case in found["cases"]] == ["1 x 128", "2 x 128"]
    text = report.region("decode_steps", tmp_path)
    assert "| 1 x 128 | 4,000 (4.00x) | **1,000** | 2,000 | 500 | T1p |" in text
    assert "A step, graph, at most: 1 event syncs, 1 h2d async." in text


def test_other_tokens_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = measured(tmp_path, monkeypatch, [[1, 3]])
    assert status == 1 and found["gate"] == "failed"
    assert "No figures." in report.region("decode_steps", tmp_path)
