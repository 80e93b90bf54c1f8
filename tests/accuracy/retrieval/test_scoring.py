"""Right answers, and steps at index_topk."""

from __future__ import annotations

import pytest

from fd_dsa.accuracy.retrieval.plan import Cell
from fd_dsa.accuracy.retrieval.scoring import ItemScore, score_answer, steps, verdict
from fd_dsa.client.questions import Answer

ASKED, OTHERS = ["K3", "B7"], ["Q1"]


def scored(text: str, references: list[str], others: list[str]) -> ItemScore:
    """The score of an answer."""
    metadata = {"task": "variables", "length": 9, "depth": 0.5}
    metadata |= {"references": references, "others": others}  # type: ignore[dict-item]
    answer = Answer("variables/9/0.5/0", text, "stop", 9, 3, 0.1, metadata=metadata)
    return score_answer(answer)


@pytest.mark.parametrize(
    ("text", "passed", "share"),
    [
        ("The variables are K3, B7.", True, 1.0),
        ("B7 and\nK3", True, 1.0),
        ("K3", False, 0.5),
        ("K3, B7 and Q1", False, 1.0),
        ("K31, xB7", False, 0.0),
        ("k3, b7", False, 0.0),
        ("K3, B7, or is it Q1?</think> K3, B7", True, 1.0),
        ("K3, B7</think>K3", False, 0.5),
        ("", False, 0.0),
    ],
)
def test_all_that_was_asked_for_and_nothing_else(text: str, passed: bool, share: float) -> None:
    score = scored(text, ASKED, OTHERS)
    assert (score.passed, score.share) == (passed, share)


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


def series(passes: dict[int, list[bool]]) -> list[ItemScore]:
    """Scores of the same items at every length: length -> whether each passes."""
    return [
        ItemScore(
            f"passkey/{length}/0/{trial}",
            Cell("passkey", length, 0.0),
            ("48213",),
            (passed,),
            (),
            Answer("", "", None, None, None, 0.0),
        )
        for length, items in passes.items()
        for trial, passed in enumerate(items)
    ]


def test_flips_are_paired_with_the_shortest_length() -> None:
    scores = series({64: [True, True, False, True], 100: [True, False, True, False]})
    assert [(s.length, s.passed, s.worse, s.better) for s in steps(scores)] == [
        (64, 3, 0, 0),
        (100, 2, 2, 1),
    ]


@pytest.mark.parametrize(
    ("bad_from", "said"),
    [(129, "look at selection"), (120, "look at decoding"), (100, "it is not selection")],
)
def test_a_collapse_is_a_step_and_where_it_begins_says_of_what(bad_from: int, said: str) -> None:
    lengths = (64, 100, 120, 128, 129, 256)
    scores = series({length: [length < bad_from] * 12 for length in lengths})
    found = verdict(scores, 128, max_tokens=16)
    assert found.startswith(f"**A step** at {bad_from} tokens (index_topk 128): 12 of 12 items")
    assert said in found


def test_what_few_items_cannot_show_is_said() -> None:
    scores = series({64: [True] * 20, 128: [True] * 20, 129: [True] * 20})
    assert "fewer than 13.9 %" in verdict(scores, 128, 16)
    scores = series({64: [True] * 20, 129: [False] + [True] * 19})
    assert "No step" in verdict(scores, 128, 16)
    assert "1 of 20 items got worse" in verdict(scores, 128, 16)


def test_a_model_that_never_passes_shows_nothing() -> None:
    assert "does not test selection" in verdict(
        series({64: [False] * 9, 129: [False] * 9}), 128, 16
    )
    assert "No lengths on both sides" in verdict(series({64: [True], 100: [True]}), 128, 16)
    assert "No lengths on both sides" in verdict(series({130: [True], 140: [True]}), 128, 16)
