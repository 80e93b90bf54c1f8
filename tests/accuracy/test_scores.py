"""scores.json: metrics of made-up runs, and what is refused when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from fd_dsa.accuracy.scores import (
    INST_LOOSE,
    PromptScore,
    Scores,
    metrics,
    parts,
    read_scores,
    write_report,
)
from fd_dsa.errors import ConfigError
from tests.accuracy.scored import pairs, prompt, run, write

THREE = run(
    [
        prompt("1", True, True),
        prompt("2", True, False, finish_reason="length"),
        PromptScore("3", ("a:0",), (False,), (True,), "sha"),
    ]
)


@given(pairs())
@settings(max_examples=20, deadline=None)
def test_a_run_is_read_as_written(tmp_path_factory: Any, both: tuple[Scores, Scores]) -> None:
    folder = write(tmp_path_factory.mktemp("runs") / "run", both[0])
    assert read_scores(folder) == both[0]
    assert read_scores(folder / "scores.json") == both[0]


def report(out: Path, scores: Scores, *notes: str) -> str:
    """Write the files of an IFEval run, and return its page."""
    figures = {name: metric.to_json() for name, metric in metrics(scores.prompts).items()}
    write_report(out, "IFEval", scores, parts(scores, notes), metrics=figures)
    return (out / "report.md").read_text("utf-8")


def test_report_files(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    page = report(out, THREE, "Warning: partial set.")
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(files) == ["report.md", "scores.json"]
    report(out, THREE, "Warning: partial set.")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert "| Prompt-level-strict-accuracy | 1/3 | 33.33 [6.1, 79.2] |" in page
    assert "| b:1 | 2 | 50.00 [9.5, 90.5] | 50.00 [9.5, 90.5] |" in page
    assert "Warning: partial set." in page
    assert "| server.kv_cache_dtype | float32 |" in page
    assert "8000" not in page
    data = json.loads((out / "scores.json").read_text("utf-8"))
    assert data["metrics"][INST_LOOSE]["value"] == 80.0


def test_answers_cut_at_max_tokens_are_told_above_two_percent(tmp_path: Path) -> None:
    assert "1 of 3 answers were cut at max_tokens 1280" in report(tmp_path, THREE)
    rare = [prompt(str(i), True, finish_reason="length" if i == 0 else "stop") for i in range(50)]
    assert "cut at max_tokens" not in report(tmp_path, run(rare))


def _changed(path: Path, *places: Any, value: Any) -> Path:
    """A run whose scores.json has another value at a place."""
    folder = write(path / "run", THREE)
    file = folder / "scores.json"
    data = json.loads(file.read_text())
    inner = data
    for place in places[:-1]:
        inner = inner[place]
    inner[places[-1]] = value
    file.write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("places", "value", "message"),
    [
        (("prompts",), [], "prompts: got none"),
        (("settings",), None, "settings: got None: .*an object"),
        (("settings",), {"task": "ifeval"}, "settings: base_url: .*required"),
        (("prompts", 1), 7, "prompts: 1: got 7: "),
        (("prompts", 1), {"key": "2"}, "prompts: 1: instruction_ids: got .*required"),
        (("prompts", 1, "key"), "1", "key '1' is there twice"),
        (("prompts", 0, "instruction_ids"), [], "there is one at least"),
        (("prompts", 0, "follow_loose"), [True], "each instruction is followed or not"),
        (("prompts", 0, "follow_strict"), [1, 0], "follow_strict: 0: got 1: .*boolean"),
    ],
)
def test_damaged_scores_are_one_clear_line(
    tmp_path: Path, places: tuple[Any, ...], value: Any, message: str
) -> None:
    folder = _changed(tmp_path, *places, value=value)
    with pytest.raises(ConfigError, match=message) as error:
        read_scores(folder)
    assert str(folder / "scores.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_unreadable_files_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scores\.json: no such file"):
        read_scores(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        read_scores(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="/dev/zero: has more bytes, allowed: at most 2000000"):
        read_scores(Path("/dev/zero"))
    (tmp_path / "scores.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="Invalid JSON"):
        read_scores(tmp_path)
