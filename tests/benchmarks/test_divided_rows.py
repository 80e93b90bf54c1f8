"""Whole and divided steps take turns in one engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks._harness import Worker
from benchmarks.divided_rows import in_turns, main


class Engine:
    """An engine that divides steps of at least 100 tokens, and gets slower with each step."""

    def __init__(self) -> None:
        self.prompts: list[int] = []

    def call(self, op: str, prefix: int, prompt: int) -> dict[str, Any]:
        assert (op, prefix) == ("after", 5000)
        self.prompts.append(prompt)
        ms = (10.0 if prompt >= 100 else 20.0) + 0.01 * len(self.prompts)
        return {"tok_s": 1e3 * prompt / ms}


def test_both_ways_take_turns_and_a_drift_cancels_out() -> None:
    engine = Engine()
    whole, divided = in_turns(cast(Worker, engine), 100, 5000)
    assert set(engine.prompts) == {99, 100}
    assert engine.prompts.count(99) == engine.prompts.count(100)
    assert whole - divided == pytest.approx(10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "name"), [("--attention", "divided_attention_2"), ("--v4", "divided_rows_v4_2")]
)
def test_a_dry_run_of_another_division(flag: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("paddle", reason="the engine computes on Paddle")
    flags = ["--dry", "-tp", "2", flag, "--contexts", "128", "--out", str(tmp_path)]
    assert main(flags) == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["tier"] == "dry"
    [case] = result["cases"]
    assert (case["tokens"], case["context"]) == (256, 128) and "gate" not in case
    assert case["ratio"] == case["whole_ms"] / case["divided_ms"]
