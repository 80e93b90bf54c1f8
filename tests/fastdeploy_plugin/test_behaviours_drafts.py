"""Decode rows with several tokens: drafts that hold, drafts that fail, and both in one batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.fakes.driver import Job
from tests.fastdeploy_plugin.engines import ours, prompt
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


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_rows_of_one_to_four_tokens_run_together(graphs: bool) -> None:
    """Each step accepts the drafts that held and one token more."""
    captured = {"use_cudagraph": True, "cudagraph_capture_sizes": [16, 8, 4]} if graphs else {}
    with ours():
        prompts = [prompt(30), prompt(62, 1)]
        outputs = answers(*(Job(one, LENGTH) for one in prompts), **SMALL)
        first, second = (one + more for one, more in zip(prompts, outputs, strict=True))
        engine = small_engine(**SPECULATIVE, **captured)
        watch = watch_steps(engine)
        output = engine.generate(
            [
                Job(first[:-LENGTH], LENGTH, drafts=right(first, 3)),
                Job(second[:-LENGTH], LENGTH, drafts=wrong_from(second, 1), chunk=25),
                Job(first[:-LENGTH], LENGTH, drafts=right(first, 0)),
                Job(second[:-LENGTH], LENGTH, drafts=right(second, 2), start_at=2),
            ]
        )
    assert output == [one[-LENGTH:] for one in (first, second, first, second)]
    assert watch.trespasses == []
    # all drafts of the first row hold, so it needs the fewest steps
    rows = np.array([step.lengths[2] for step in watch.steps if step.lengths.shape[1] == 4])
    assert (rows[:, 0] > 0).sum() < (rows[:, 2] > 0).sum()
    sizes = {tuple(sorted(step.lengths[2])) for step in watch.steps if not step.lengths[0].any()}
    assert any(len(set(one)) > 2 for one in sizes)
    assert {"mixed", "drafts"} <= watch.kinds()
    assert ("graph" in watch.kinds()) == graphs
