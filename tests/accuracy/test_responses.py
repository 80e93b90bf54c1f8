"""`score` of an official response file: GPT-4's published answers, and files with defects."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.accuracy.cli import main
from fd_dsa.accuracy.prompts import OFFICIAL, read_prompts
from fd_dsa.accuracy.scores import METRICS, by_type, read_scores
from tests.accuracy import gpt4

PROMPTS = read_prompts()
ROWS = gpt4.rows()


def written(folder: Path, rows: Sequence[Any]) -> Path:
    """A response file."""
    file = folder / "responses.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return file


@pytest.mark.slow
def test_published_answers_in_any_order_give_the_published_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(ROWS)
    random.Random(3).shuffle(rows)
    assert main(["score", str(written(tmp_path, rows)), "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out/scores.json").read_text())["metrics"]
    assert tuple(metrics[name]["passed"] for name in METRICS) == gpt4.PASSED == (417, 698, 430, 713)
    assert [metrics[name]["total"] for name in METRICS] == [541, 834, 541, 834]
    found = read_scores(tmp_path / "out")
    assert [score.key for score in found.prompts] == [prompt.key for prompt in PROMPTS]
    types = {name: (*t[1:], t[0]) for name, t in by_type(found.prompts).items()}
    assert types == gpt4.BY_TYPE
    assert (found.settings.task, found.settings.model) == ("ifeval", "responses")
    shown = capsys.readouterr().out
    assert "The file has another wording of key 2785;" in shown
    assert "Warning" not in shown


def test_prompts_without_a_response_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "five.jsonl"
    prompts.write_text("\n".join(OFFICIAL.read_text("utf-8").splitlines()[:5]), "utf-8")
    file = written(tmp_path, ROWS[:3])
    assert main(["score", str(file), "--prompts", str(prompts)]) == 0
    missing = f"{PROMPTS[3].key}, {PROMPTS[4].key}"
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Warning: 2 prompts have no response and are left out: key {missing}." in shown
    assert "partial set: 3 prompts with 5 instructions, of 541 prompts" in shown
    assert len(read_scores(tmp_path).prompts) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "Say hello.", "response": "x"},
            "'Say hello.' is not one of the 541 prompts; --pr",
        ),
        (ROWS[0], "responses.jsonl:1; each prompt has one response"),
        ({"prompt": "a", "response": None}, "response: got None: Input should be a valid string"),
        ({"response": "a"}, "prompt: got {'response': 'a'}: Field required"),
        ([1], "got [1]: Input should be an object"),
        ("{", "got b'{': Invalid JSON"),
    ],
)
def test_a_line_that_cannot_be_scored_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, message: str
) -> None:
    file = written(tmp_path, [*ROWS[:2], "", row])
    assert main(["score", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fd_dsa: error: {file}:4: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_prompt_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    instructions = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    prompts.write_text(json.dumps({"key": 1, "prompt": "Say hello.", **instructions}))
    rows = [{"prompt": "Say hello.", "response": "Hello."}]
    flags = ["--prompts", str(prompts)]
    assert main(["score", str(written(tmp_path, rows)), *flags]) == 0
    assert [score.follow_strict for score in read_scores(tmp_path).prompts] == [(True,)]
    capsys.readouterr()
    assert main(["score", str(tmp_path), *flags]) == 2
    assert "--prompts: only with a response file" in capsys.readouterr().err
