"""The layer for multi-token prediction as a drafter: exact outputs, and drafts as offline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.engine.mtp_drafter import MtpDrafter
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.runner import ModelRunner
from fd_dsa.startup.measure import measure_step_costs
from tests.engine.mtp_engine import (
    WatchedDrafter,
    answers,
    dear_layer,
    make_engine,
    make_model,
    make_runner,
)
from tests.one_order import check_equal_bits
from tests.runner.tiny import V32

# all bits are equal, drafts or none, by any method
PROGRAM = """
from fd_dsa.environment import prepare_cpu_runtime
prepare_cpu_runtime()
from fd_dsa.runner import ModelRunner
from tests.engine.mtp_engine import answers, make_model, shown
from tests.runner.tiny import V32
model = make_model(V32)
plain, engine, _ = answers(model, None)
for method in ("mtp", "ngram"):
    ends, engine, _ = answers(model, method)
    assert plain.keys() == ends.keys()
    for name, output in ends.items():
        assert shown(output) == shown(plain[name]), (method, name)
    stats = engine.stats()
    assert stats.num_preemptions and stats.prefix_cache_hits and stats.num_accepted_tokens
print("equal")
"""


def test_no_bit_depends_on_drafts() -> None:
    check_equal_bits(PROGRAM)


@pytest.mark.parametrize("costs", [None, dear_layer(3)], ids=["always", "while it pays"])
def test_drafts_are_those_of_an_offline_computation(costs: DraftCosts | None) -> None:
    model = make_model(V32)
    _, engine, drafter = answers(model, "mtp", costs=costs)
    stats = engine.stats()
    assert stats.num_preemptions and stats.prefix_cache_hits
    left = [request for request in drafter.proposed if request.drafts is None]
    assert bool(left) == bool(costs) == (drafter.num_runs < 0.7 * stats.num_steps)
    same: list[list[bool]] = [[], [], []]
    for request, proposed in drafter.proposed.items():
        if request.params.temperature or request.params.repetition_penalty != 1:
            continue
        for place, drafts in proposed.items():
            wanted = offline(model, request.token_ids[:place], len(drafts))
            for depth, pair in enumerate(zip(drafts, wanted, strict=True)):
                same[depth].append(pair[0] == pair[1])
    assert min(map(len, same)) > 40
    # after a fork a shared block's last entry is that of another continuation
    assert min(map(np.mean, same)) > 0.95 and np.mean(same[0]) > 0.97


def offline(model: Any, ids: list[int], count: int) -> list[int]:
    """The drafts after some tokens, greedy, by a runner that computes these alone."""
    runner, drafts = make_runner(model, 20), list[int]()
    runner.input_batch.set_blocks(0, range(12))
    for begin in range(0, len(ids) - 1, 24):
        chunk = ids[begin : begin + 24][: len(ids) - 1 - begin]
        runner.input_batch.begin_step()
        runner.input_batch.add_row(0, chunk, begin, is_prefill=True)
        runner.execute_model(np.array([0]))
        next_ids = np.array(ids[begin + 1 : begin + 1 + len(chunk)])
        logits = runner.predict_more(next_ids, np.array([len(chunk) - 1]))
    while True:
        drafts.append(int(logits[0].argmax()))
        if len(drafts) == count:
            return drafts
        runner.input_batch.begin_step()
        runner.input_batch.add_row(0, drafts[-1:], len(ids) + len(drafts) - 2, is_prefill=False)
        logits = runner.predict_more(np.array(drafts[-1:]), [0], follows=[0])


@pytest.mark.parametrize("breaks", [False, True])
def test_a_drafter_that_gives_nan_or_fails_changes_nothing(
    breaks: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(V32)
    plain, _, _ = answers(model, None)
    calls = []

    def predict_more(runner: ModelRunner, next_ids: np.ndarray, tokens: list[int]) -> np.ndarray:
        calls.append(len(next_ids))
        if breaks and len(calls) == 5:
            raise OSError("the device is gone")
        return np.full((len(tokens), runner.vocab_size), np.nan, np.float32)

    monkeypatch.setattr(ModelRunner, "predict_more", predict_more)
    ends, engine, _ = answers(model, "mtp")
    assert engine.stats().num_draft_tokens == 0
    assert {name: one.token_ids for name, one in ends.items()} == {
        name: one.token_ids for name, one in plain.items()
    }
    assert ("the drafter failed" in caplog.text) is breaks
    assert (len(calls) == 5) is breaks


def test_prompts_that_came_together_have_no_drafts_where_those_of_one_alone_pay() -> None:
    costs = DraftCosts({1: [1.0, 1.1], 2: [1.1, 10.0]})
    runs = []
    for count in (1, 2):
        runner = make_runner(make_model(V32), 20)
        drafter = WatchedDrafter(runner, 1)
        engine = make_engine(runner, SpecDecoder(drafter, 1, costs), 20)
        for number in range(count):
            engine.add_request(str(number), [*range(2, 9)], SamplingParams(max_tokens=1))
        engine.step()
        runs.append(drafter.num_runs)
    assert runs == [1, 0]


def test_steps_are_measured_when_an_engine_starts() -> None:
    runner = make_runner(make_model(V32), 40)
    costs = measure_step_costs(
        lambda spec_decoder: make_engine(runner, spec_decoder, 40), MtpDrafter(runner), 3
    )
    batch = runner.input_batch
    assert (batch.block_tables == -1).all() and not batch.num_scheduled_tokens.any()
    assert runner.counters.mask_offsets_launched == runner.counters.mask_offsets_skipped == 0
    assert costs is not None
    one, *more = costs.of(4, 4)
    assert 0 < one <= more[0] <= more[1] <= more[2]
