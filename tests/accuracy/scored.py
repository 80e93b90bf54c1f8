"""Scored runs, made up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fd_dsa.accuracy.scores import PromptScore, RunSettings, Scores

SETTINGS = RunSettings(
    task="ifeval",
    base_url="http://127.0.0.1:8000/v1",
    model="demo_model",
    temperature=0.0,
    max_tokens=1280,
    seed=0,
    concurrency=8,
    server={"version": "0.1.0", "kv_cache_dtype": "float32", "max_num_seqs": 32},
    task_settings={"prompts_sha256": "67ff"},
)


def prompt(key: str, *follow: bool, text: str = "", **fields: Any) -> PromptScore:
    """A prompt with instructions a:0, b:1, ... followed as told, loosely the same."""
    names = tuple(f"{'abcdefgh'[i]}:{i}" for i in range(len(follow)))
    sha = hashlib.sha256(text.encode()).hexdigest()
    fields = {"finish_reason": "stop", **fields}
    return PromptScore(key, names, tuple(follow), tuple(follow), sha, **fields)


def run(prompts: Sequence[PromptScore], **settings: Any) -> Scores:
    """A run with `SETTINGS`, some of them replaced."""
    return Scores(replace(SETTINGS, **settings), tuple(prompts))


def passing(passed: Sequence[bool], label: str = "") -> Scores:
    """A run of prompts with one instruction each; answers differ where the result does."""
    return run([prompt(str(i), good, text=f"{i}{good}{label}") for i, good in enumerate(passed)])


def write(folder: Path, scores: Scores) -> Path:
    """The folder of a run, with its scores.json."""
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(scores.to_json(), "utf-8")
    return folder


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Scores, Scores]:
    """Two runs over the same prompts, of one to three instructions each."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=12))
    runs = []
    for _ in range(2):
        rows = [draw(st.tuples(*[st.booleans()] * size)) for size in sizes]
        texts = [draw(st.sampled_from(("x", "y"))) for _ in sizes]
        runs.append(run([prompt(str(i), *r, text=texts[i]) for i, r in enumerate(rows)]))
    return runs[0], runs[1]
