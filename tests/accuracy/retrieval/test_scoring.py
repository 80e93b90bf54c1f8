"""Right answers, and steps at index_topk."""

from __future__ import annotations

import pytest

from fd_dsa.accuracy.retrieval.scoring import changes_by_length, score_answer, verdict
from fd_dsa.accuracy.scores import PromptScore
from fd_dsa.client.questions import Answer

ASKED, OTHERS = ["K3", "B7"], ["Q1"]


def scored(text: str, references: list[str], others: list[str]) -> PromptScore:
    """The score of an answer."""
    metadata = {"references": references, "others": others}
    answer = Answer("variables/9/0.5/0", text, "stop", 9, 3, 0.1, metadata=metadata)
    return score_answer(answer)


@pytest.mark.parametrize(
    ("text", "passed", "named"),
    [
        ("The variables are K3, B7.", True, 2),
        ("B7 and\nK3", True, 2),
        ("K3", False, 1),
        ("K3, B7 and Q1", False, 2),
        ("K31, xB7", False, 0),
        ("k3, b7", False, 0),
        ("K3, B7, or is it Q1?</think> K3, B7", True, 2),
        ("K3, B7</think>K3", False, 1),
        ("", False, 0),
    ],
)
def test_all_that_was_asked_for_and_nothing_else(text: str, passed: bool, named: int) -> None:
    score = scored(text, ASKED, OTHERS)
    assert (score.passed, sum(score.follow_loose)) == (passed, named)


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("It is 4821377.", True),
        ("It is 4,821,377.", True),
        ("4821377,1234567", True),
        ("It is 48213771.", False),
        ("It is 482137.", False),
        ("It is 4821377 or 7000000", False),
    ],
)
def test_numbers_are_whole(text: str, passed: bool) -> None:
    assert scored(text, ["4821377"], ["7000000"]).passed is passed


def series(passes: dict[int, list[bool]]) -> list[PromptScore]:
    """Scores of the same items at every length: length -> whether each passes."""
    return [
        PromptScore(f"passkey/{length}/0/{trial}", ("passkey",), (passed,), (passed,), "sha")
        for length, items in passes.items()
        for trial, passed in enumerate(items)
    ]


def test_flips_are_paired_with_the_shortest_length() -> None:
    scores = series({64: [True, True, False, True], 100: [True, False, True, False]})
    changes = changes_by_length(scores)
    assert {n: (c.after.passed, c.worse, c.better) for n, c in changes.items()} == {
        64: (3, 0, 0),
        100: (2, 2, 1),
    }


def said_of(passes: dict[int, list[bool]]) -> str:
    """The verdict on items of a model with 128 selected keys."""
    return verdict(changes_by_length(series(passes)), 128, max_tokens=16)


@pytest.mark.parametrize(
    ("bad_from", "said"),
    [(129, "look at selection"), (120, "look at decoding"), (100, "it is not selection")],
)
def test_a_collapse_is_a_step_and_where_it_begins_says_of_what(bad_from: int, said: str) -> None:
    lengths = (64, 100, 120, 128, 129, 256)
    found = said_of({length: [length < bad_from] * 12 for length in lengths})
    assert found.startswith(f"**A step** at {bad_from} tokens (index_topk 128): 12 of 12 items")
    assert said in found


def test_what_few_items_cannot_show_is_said() -> None:
    said = said_of({64: [True] * 20, 128: [True] * 20, 129: [True] * 20})
    assert "fewer than 13.9 %" in said
    said = said_of({64: [True] * 20, 129: [False] + [True] * 19})
    assert "No step" in said and "1 of 20 items got worse" in said


def test_a_model_that_never_passes_shows_nothing() -> None:
    assert "does not test selection" in said_of({64: [False] * 9, 129: [False] * 9})
    assert "No lengths on both sides" in said_of({64: [True], 100: [True]})
    assert "No lengths on both sides" in said_of({130: [True], 140: [True]})
