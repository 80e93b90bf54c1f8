"""Scores are repeatable; test_responses.py compares them with those of the reference."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

import langdetect
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.accuracy.prompts import read_prompts
from fd_dsa.accuracy.scorer import ready, score
from fd_dsa.accuracy.scores import PromptScore
from fd_dsa.client.questions import Answer, Question
from fd_dsa.errors import ConfigError
from tests.accuracy import gpt4

PROMPTS = read_prompts()
BY_KEY = {prompt.key: prompt for prompt in PROMPTS}
# the prompts whose checkers draw random numbers
RANDOM_KEYS = ("1122", "1129")


def answer_to(prompt: Question, text: str) -> Answer:
    """An answer to a prompt."""
    return Answer(prompt.key, text, messages=prompt.messages, metadata=prompt.metadata)


def answered(prompts: Sequence[Question], texts: Sequence[str]) -> list[PromptScore]:
    """Scores of texts."""
    return score([answer_to(*pair) for pair in zip(prompts, texts, strict=True)])


def test_score_depends_on_prompt_and_answer_alone() -> None:
    responses = [row["response"] for row in gpt4.rows()]
    some = [i for i, prompt in enumerate(PROMPTS) if prompt.key in RANDOM_KEYS or i % 25 == 0]
    scores: dict[int, PromptScore] = {}
    for seed, order in ((1, some), (2, some[::-1]), (3, some[-1:])):
        random.seed(seed)
        again = answered([PROMPTS[i] for i in order], [responses[i] for i in order])
        scores = scores or dict(zip(order, again, strict=True))
        assert again == [scores[i] for i in order]


def test_random_numbers_are_put_back() -> None:
    langdetect.DetectorFactory.seed = 5
    state = random.getstate()
    try:
        answered([BY_KEY["1122"]], ["word"])
        ready([BY_KEY["1122"]])
        assert random.getstate() == state
        assert langdetect.DetectorFactory.seed == 5
    finally:
        langdetect.DetectorFactory.seed = None


def test_the_checkers_of_two_prompts_draw() -> None:
    ready(PROMPTS[:1])
    from lm_eval.tasks.ifeval.utils import process_results

    drawing = []
    for prompt in PROMPTS:
        state = random.getstate()
        document = {
            "key": prompt.key,
            "prompt": prompt.text,
            "instruction_id_list": prompt.metadata["instruction_ids"],
            "kwargs": prompt.metadata["kwargs"],
        }
        process_results(document, [""])
        drawing += [prompt.key] if random.getstate() != state else []
    assert tuple(drawing) == RANDOM_KEYS


def test_empty_answer_follows_nothing() -> None:
    scores = answered(PROMPTS, ["", " \n\n\t"] * 270 + [""])
    assert not any(any(one.follow_strict + one.follow_loose) for one in scores)


PIECES = (
    "P.S. yes", "P.P.S none", "<<a title>>", "* item\n", "*bold* ", "[name] ", "\n\n", "\n***\n",
    "******", "SECTION 1", "Section 2", '"', "my answer is yes.", "My answer is no.", '{"a": 1}',
    "```json\n", "```", "ALL CAPITALS. ", "small letters. ", "Anything else?",
    "नमस्ते दुनिया ", "привет, мир ", "\r", "\x00", "\u2028", "💡", "### ", "- point\n", "1. one\n",
)  # fmt: skip


@settings(max_examples=40)
@given(
    prompt=st.sampled_from([one for one in PROMPTS if one.key not in RANDOM_KEYS]),
    pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=12), max_size=12),
    repeats=st.booleans(),
)
def test_loose_is_never_below_strict(prompt: Question, pieces: list[str], repeats: bool) -> None:
    text = (prompt.text if repeats else "") + "".join(pieces)
    (one,) = answered([prompt], [text])
    assert (
        len(one.follow_strict) == len(one.follow_loose) == len(prompt.metadata["instruction_ids"])
    )
    pairs = zip(one.follow_strict, one.follow_loose, strict=True)
    assert all(loose or not strict for strict, loose in pairs)


def test_score_keeps_what_is_known_of_the_answer() -> None:
    known = replace(answer_to(PROMPTS[0], "An ägg."), finish_reason="length", prompt_tokens=50)
    (one,) = score([replace(known, completion_tokens=1280)])
    assert (one.key, one.finish_reason) == ("1000", "length")
    assert (one.prompt_tokens, one.completion_tokens) == (50, 1280)
    assert one.answer_sha256 == hashlib.sha256("An ägg.".encode()).hexdigest()
    assert list(one.instruction_ids) == PROMPTS[0].metadata["instruction_ids"]


def test_ready_names_what_scores_and_refuses_what_the_checkers_cannot_read() -> None:
    found = ready(PROMPTS)
    assert found["lm_eval"].startswith("0.4.")
    assert found.keys() == {"lm_eval", "nltk", "langdetect", "punkt_tab_sha256"}
    assert len(found["punkt_tab_sha256"]) == 64
    rules = {
        "instruction_ids": ["language:response_language"],
        "kwargs": [{"language": "klingon"}],
    }
    strange = replace(PROMPTS[0], metadata=rules)
    with pytest.raises(
        ConfigError, match=r"prompt '1000': the checkers refuse it .KeyError.*kling"
    ):
        ready([strange])
