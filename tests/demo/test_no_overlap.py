"""No prompt of IFEval in what the generators write: no eight neighbouring words of one."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
from demo_training.tables import load

WORDS = 8
PROMPTS = files("fd_dsa.accuracy") / "data" / "ifeval_prompts.jsonl"


def runs(text: str) -> list[tuple[str, ...]]:
    """All runs of eight words of a text, without case and marks."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))
    return [tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]


@pytest.fixture(scope="module")
def prompt_runs() -> set[tuple[str, ...]]:
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return {run for line in lines for run in runs(json.loads(line)["prompt"])}


def test_a_prompt_would_be_found(prompt_runs):
    prompt = json.loads(PROMPTS.read_text(encoding="utf-8").splitlines()[0])["prompt"]
    assert len(prompt_runs) > 10_000
    assert prompt_runs & set(runs("Please: " + prompt))


def test_generated_documents_hold_no_run_of_words_of_a_prompt(generator, prompt_runs):
    for _ in range(6000):
        for _, text in generator.document():
            assert not prompt_runs & set(runs(text)), text


def test_wordings_of_rules_hold_no_run_of_words_of_a_prompt(prompt_runs):
    fields = dict.fromkeys("lkwim", "four") | {"n": "3", "x": "2", "mark": "Part", "phrase": "Bye."}
    rules = load("long_rules")
    for wordings in (*rules.imperatives.values(), *rules.sentences.values(), rules.starts):
        for wording in wordings:
            text = wording.format(r="do it", **fields)
            assert not prompt_runs & set(runs(text)), text
