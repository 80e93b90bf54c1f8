"""Prompts: exact length, needles where they should stand, one right answer, all from one seed."""

from __future__ import annotations

import hashlib
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.accuracy.retrieval.plan import Plan
from fd_dsa.accuracy.retrieval.prompts import (
    BEFORE,
    TASKS,
    Item,
    PromptBuilder,
    TokenCounter,
    sentences,
)
from fd_dsa.accuracy.retrieval.scoring import named
from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import ConfigError
from tests.accuracy.retrieval.reader import read

DEPTHS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
LENGTHS = st.integers(260, 900)
SEEDS = st.integers(0, 10**6)


class Words:
    """Counts words; a prompt has three more."""

    def text(self, text: str) -> int:
        return len(text.split())

    def prompt(self, content: str) -> int:
        return self.text(content) + 3


class Characters:
    """Every character is this many tokens."""

    def __init__(self, each: int = 1) -> None:
        self.each = each

    def text(self, text: str) -> int:
        return self.each * len(text)

    def prompt(self, content: str) -> int:
        return self.text(content)


@cache
def counter() -> TokenCounter:
    """The demo model's tokenizer."""
    return TokenCounter(Tokenizer.from_folder(demo_model_path()), "--tokenizer")


@cache
def builder() -> PromptBuilder:
    """Prompts in the demo model's tokens."""
    return PromptBuilder(counter())


@cache
def longest_sentence() -> int:
    """Tokens of the longest one of the tales."""
    return max(counter().text(f" {sentence}") for sentence in sentences())


def make(task: str, seed: int, depth: float, length: int) -> tuple[Item, str]:
    """Return a hidden item and its prompt."""
    item = TASKS[task](Random(seed), depth)
    return item, builder().build(item, length, Random(seed))


def plan(**changes: object) -> Plan:
    """A small plan."""
    fields = {
        "tasks": ("passkey", "variables"),
        "lengths": (150, 300),
        "depths": (0.0, 0.5),
        "trials": 2,
        "seed": 0,
        "paired": False,
        "max_tokens": 8,
        **changes,
    }
    return Plan(**fields)  # type: ignore[arg-type]


def contents(of: Plan) -> dict[str, str]:
    """Key -> prompt, in words."""
    return {q.key: q.messages[0]["content"] for q in of.questions(PromptBuilder(Words()))}


@settings(max_examples=60)
@given(st.sampled_from(sorted(TASKS)), SEEDS, DEPTHS, LENGTHS)
def test_a_prompt_has_exactly_the_tokens_asked_for(
    task: str, seed: int, depth: float, length: int
) -> None:
    item, content = make(task, seed, depth, length)
    assert counter().prompt(content) == length
    assert content.startswith(BEFORE) and content.endswith(f"\n\n{item.question}")
    assert all(content.count(needle.sentence) == 1 for needle in item.needles)


@settings(max_examples=40)
@given(st.sampled_from(["passkey", "multikey", "variables"]), SEEDS, DEPTHS, LENGTHS)
def test_the_needle_stands_where_the_depth_says(
    task: str, seed: int, depth: float, length: int
) -> None:
    item, content = make(task, seed, depth, length)
    body = content.removeprefix(BEFORE).removesuffix(item.question).strip()
    before, after = body.split(item.needles[0].sentence)
    # the other hidden sentences are not of the haystack
    for needle in item.needles[1:]:
        before, after = before.replace(needle.sentence, ""), after.replace(needle.sentence, "")
    here, all_of_it = counter().text(before), counter().text(before) + counter().text(after)
    # at a border of sentences; the cut sentence and joints count a little otherwise
    assert abs(here - depth * all_of_it) <= longest_sentence() / 2 + 4
    if depth == 0:
        assert not before.strip()
    if depth == 1:
        assert not after.strip()


@settings(max_examples=40)
@given(st.sampled_from(sorted(TASKS)), SEEDS, DEPTHS)
def test_a_careful_reader_finds_one_answer(task: str, seed: int, depth: float) -> None:
    item, content = make(task, seed, depth, 400)
    answer = read(content)
    assert named(answer, item.references) == item.references
    assert named(answer, item.others) == ()
    # what is hidden is nowhere else
    text = content.removesuffix(item.question)
    for needle in item.needles:
        text = text.replace(needle.sentence, "")
    assert named(text, (*item.references, *item.others)) == ()


def test_one_seed_gives_one_set_of_prompts() -> None:
    first = contents(plan())
    assert contents(plan()) == first
    assert len(set(first.values())) == len(first) == 16
    assert not set(contents(plan(seed=1)).values()) & set(first.values())
    # on every machine and Python: a run of last year can be compared with one of today
    digest = hashlib.sha256("\n".join(first.values()).encode()).hexdigest()
    assert digest == "2d7f0b4073c6f8a392965e1b8237e29e59c7ea412d72bc07565e36f519ef3b3f"


def test_paired_lengths_hide_the_same_things_in_the_same_tales() -> None:
    for paired in (True, False):
        questions = list(plan(paired=paired).questions(PromptBuilder(Words())))
        short = {q.key: q for q in questions if "/150/" in q.key}
        long = {q.key.replace("/300/", "/150/"): q for q in questions if q.key not in short}
        assert short.keys() == long.keys()
        for key, question in short.items():
            other = long[key]
            same = question.metadata["references"] == other.metadata["references"]
            assert same is paired
            if key.startswith("passkey/150/0/"):
                # the needle, then the same tale, only longer
                texts = [q.messages[0]["content"][:400] for q in (question, other)]
                assert (texts[0] == texts[1]) is paired


def test_a_length_without_room_for_the_question_is_refused() -> None:
    item = TASKS["variables"](Random(0), 0.5)
    with pytest.raises(ConfigError, match=r"--lengths: got 60; .* at least 1\d\d are needed"):
        builder().build(item, 60, Random(0))


def test_tokens_of_other_sizes() -> None:
    item = TASKS["passkey"](Random(0), 0.5)
    for length in range(900, 920):
        content = PromptBuilder(Characters()).build(item, length, Random(length))
        assert len(content) == length
    with pytest.raises(ConfigError, match="exactly that length"):
        PromptBuilder(Characters(2)).build(item, 1001, Random(0))


def test_a_text_longer_than_the_tales_begins_them_again() -> None:
    item = TASKS["passkey"](Random(0), 1.0)
    length = 2 * sum(len(sentence.split()) for sentence in sentences())
    content = PromptBuilder(Words()).build(item, length, Random(0))
    assert Words().prompt(content) == length
    assert content.count(sentences()[7]) == 2
    assert content.count("The pass key is") == 1
