"""Decode rows with several tokens: drafts that hold, drafts that fail, and both in one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.trees import TREES
from tests.fastdeploy_plugin.engines import job, ours, prompt
from tests.fastdeploy_plugin.watching import answers, small_engine, watch_steps

NUM_DRAFTS = 3
LENGTH = 13
# beyond it keys are chosen; drafts of a row see one key more each
SMALL = {"index_topk": 16, "enable_overlap_schedule": False}
SPECULATIVE = {**SMALL, "method": "ngram", "num_speculative_tokens": NUM_DRAFTS}


def right(wanted: list[int], count: int) -> Callable[[list[int]], list[int]]:
    """The next `count` tokens of a sequence."""
    return lambda tokens: wanted[len(tokens) : len(tokens) + count]


def wrong_from(wanted: list[int], place: int) -> Callable[[list[int]], list[int]]:
    """Drafts that leave the sequence at a place."""

    def drafts(tokens: list[int]) -> list[int]:
        found = wanted[len(tokens) : len(tokens) + NUM_DRAFTS]
        return [token if n < place else token + 1 for n, token in enumerate(found)]

    return drafts


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    """Sequences without drafts."""
    with ours():
        prompts = [prompt(30), prompt(62, 1)]
        outputs = answers(*(job(one, LENGTH) for one in prompts), **SMALL)
        return [one + output for one, output in zip(prompts, outputs, strict=True)]


@pytest.mark.parametrize(
    ("tree", "held", "num_steps"),
    [("develop", 3, 4), ("pr7367", 2, 5), ("develop", 1, 7), ("develop", 0, 13)],
    ids=["all", "two", "one", "none"],
)
def test_a_row_goes_on_where_its_drafts_failed(
    tree: str, held: int, num_steps: int, plain: list[list[int]]
) -> None:
    """Each step accepts the drafts that held and one token more."""
    with ours(TREES[tree]):
        engine = small_engine(**SPECULATIVE)
        for sequence in plain:
            tokens, watch = sequence[:-LENGTH], watch_steps(engine)
            output = engine.generate([job(tokens, LENGTH, drafts=wrong_from(sequence, held))])
            assert output == [sequence[-LENGTH:]]
            assert watch.trespasses == []
            assert len(watch.steps) == num_steps
            cached = [int(step.lengths[1, 0]) for step in watch.steps[1:]]
            start = len(tokens)
            assert cached == [start + n * (held + 1) for n in range(len(cached))]
            for step in watch.steps:
                first, count = step.lengths[1, 0], step.lengths[2, 0]
                assert step.position_ids.tolist() == list(range(first, first + count))


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_rows_of_one_to_four_tokens_run_together(graphs: bool, plain: list[list[int]]) -> None:
    first, second = plain
    captured = {"use_cudagraph": True, "cudagraph_capture_sizes": [16, 8, 4]} if graphs else {}
    with ours():
        engine = small_engine(**SPECULATIVE, **captured)
        watch = watch_steps(engine)
        output = engine.generate(
            [
                job(first[:-LENGTH], LENGTH, drafts=right(first, 3)),
                job(second[:-LENGTH], LENGTH, drafts=wrong_from(second, 1), chunk=25),
                job(first[:-LENGTH], LENGTH, drafts=right(first, 0)),
                job(second[:-LENGTH], LENGTH, drafts=right(second, 2), start_at=2),
            ]
        )
    assert output == [one[-LENGTH:] for one in (first, second, first, second)]
    assert watch.trespasses == []
    sizes = {tuple(sorted(step.lengths[2])) for step in watch.steps if "decode" in kind_of(step)}
    assert any(len(set(one)) > 2 for one in sizes)
    assert {"mixed", "drafts"} <= watch.kinds()
    assert ("graph" in watch.kinds()) == graphs


def kind_of(step: Any) -> str:
    return "prefill" if step.lengths[0].any() else "decode"
