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

from fd_dsa.accuracy.prompts import Prompt, read_prompts
from fd_dsa.accuracy.scorer import random_keys, ready, score
from fd_dsa.accuracy.scores import PromptScore
from fd_dsa.client.questions import Answer
from fd_dsa.errors import ConfigError
from tests.accuracy import gpt4

PROMPTS = read_prompts()
BY_KEY = {prompt.key: prompt for prompt in PROMPTS}


def answered(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[PromptScore]:
    """Scores of texts."""
    pairs = zip(prompts, texts, strict=True)
    return score(prompts, [Answer(prompt.key, text) for prompt, text in pairs])


def test_score_depends_on_prompt_and_answer_alone() -> None:
    responses, keys = [row["response"] for row in gpt4.rows()], random_keys(PROMPTS)
    some = [i for i, prompt in enumerate(PROMPTS) if prompt.key in keys or i % 25 == 0]
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


def test_random_keys_are_the_prompts_whose_checkers_draw() -> None:
    ready(PROMPTS[:1])
    from lm_eval.tasks.ifeval.utils import process_results

    assert random_keys(PROMPTS) == ("1122", "1129")
    drawing = []
    for prompt in PROMPTS:
        state = random.getstate()
        document = {
            "key": prompt.key,
            "prompt": prompt.text,
            "instruction_id_list": prompt.instruction_ids,
            "kwargs": prompt.kwargs,
        }
        process_results(document, [""])
        drawing += [prompt.key] if random.getstate() != state else []
    assert tuple(drawing) == random_keys(PROMPTS)


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
    prompt=st.sampled_from([one for one in PROMPTS if one.key not in random_keys(PROMPTS)]),
    pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=12), max_size=12),
    repeats=st.booleans(),
)
def test_loose_is_never_below_strict(prompt: Prompt, pieces: list[str], repeats: bool) -> None:
    text = (prompt.text if repeats else "") + "".join(pieces)
    (one,) = answered([prompt], [text])
    assert len(one.follow_strict) == len(one.follow_loose) == len(prompt.instruction_ids)
    pairs = zip(one.follow_strict, one.follow_loose, strict=True)
    assert all(loose or not strict for strict, loose in pairs)


def test_score_keeps_what_is_known_of_the_answer() -> None:
    answer = Answer("1000", "An ägg.", "length", 50, 1280, 2.5)
    (one,) = score(PROMPTS[:1], [answer])
    assert (one.key, one.finish_reason) == ("1000", "length")
    assert (one.prompt_tokens, one.completion_tokens) == (50, 1280)
    assert one.answer_sha256 == hashlib.sha256("An ägg.".encode()).hexdigest()
    assert one.instruction_ids == PROMPTS[0].instruction_ids
    assert answered(PROMPTS[:1], ["half a character \ud83d"])[0].answer_sha256 != one.answer_sha256
    failed = replace(answer, text="no comma", error="timed out")
    assert not any(score(PROMPTS[:1], [failed])[0].follow_loose)


def test_ready_names_what_scores_and_refuses_what_the_checkers_cannot_read() -> None:
    found = ready(PROMPTS)
    assert found["lm_eval"].startswith("0.4.")
    assert found.keys() == {"lm_eval", "nltk", "langdetect", "punkt_tab_sha256"}
    assert len(found["punkt_tab_sha256"]) == 64
    strange = replace(
        PROMPTS[0],
        instruction_ids=("language:response_language",),
        kwargs=({"language": "klingon"},),
    )
    with pytest.raises(
        ConfigError, match=r"prompt '1000': the checkers refuse it .KeyError.*kling"
    ):
        ready([strange])
