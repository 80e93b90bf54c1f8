"""Random request histories: nothing breaks an invariant, and what does break one is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fd_dsa.engine.batch import ScheduledBatch
from fd_dsa.engine.block_keys import BlockKeys
from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.metrics import EngineStats
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.scheduler import Scheduler
from tests.soak.histories import Arrival, History, make_engine, run_alone, run_histories
from tests.soak.planted import check_it_is_found


def test_random_histories_keep_every_invariant() -> None:
    counts = run_histories(first=1_000_000, count=30)
    # a history in which nothing happens would keep them too
    for what in (
        "aborted outputs",
        "accepted drafts",
        "drafts queued ahead",
        "evicted blocks",
        "failed steps",
        "outputs with an error",
        "preemptions",
        "prompt tokens from the prefix cache",
    ):
        assert counts[what] > 0, what


def one_request(**options: Any) -> History:
    """Forty tokens of a request alone, whose drafts a device verifies."""
    params = SamplingParams(temperature=0, max_tokens=37, ignore_eos=True)
    return History(
        num_blocks=12,
        block_size=4,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        enable_prefix_caching=True,
        nan_share=0,
        fail_share=0,
        target_gap_s=0,
        clock_seed=0,
        arrivals=(Arrival((5, 6, 7), params, 0, None),),
        draws_on_device=True,
        async_scheduling=True,
        max_drafts=3,
        **options,
    )


def run_ahead(history: History) -> tuple[list[tuple[int, bool]], EngineStats]:
    """Run it; how many outputs each step gave, and whether one was in flight after it."""
    engine, (arrival,) = make_engine(history), history.arrivals
    engine.add_request("0", arrival.prompt, arrival.params)
    ahead, tokens = [], []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        tokens += [token for output in outputs for token in output.new_token_ids]
        ahead.append((len(outputs), engine.in_flight is not None))
    assert tokens == run_alone(arrival, history)[0][0]
    return ahead, engine.stats()


def test_right_drafts_are_verified_by_steps_queued_ahead() -> None:
    """One token of the prompt's step, then nine steps of four."""
    ahead, stats = run_ahead(one_request(right_share=1.0, drafts_on_device=True))
    assert (stats.num_steps, stats.num_accepted_tokens) == (10, 27)
    # the first waits for none, and the one after the last that may be the end is planned late
    assert ahead == [(0, True), *[(1, True)] * 9, (1, False)]


def test_steps_are_queued_ahead_while_a_drafter_that_reads_tokens_has_no_draft() -> None:
    ahead, stats = run_ahead(one_request(right_share=None, drafts_on_device=False))
    # one that is always right has drafts of all tokens but the first
    always, _ = run_ahead(one_request(right_share=1.0, drafts_on_device=False))
    assert [is_ahead for _, is_ahead in always][:3] == [True, False, False]
    assert not any(is_ahead for _, is_ahead in always[1:])
    assert stats.num_draft_tokens and 3 < sum(is_ahead for _, is_ahead in ahead) < len(ahead) - 3


def _hands_out_twice(original: Callable[..., Any]) -> Callable[..., Any]:
    """A block that is given away stays in the free list."""

    def take(self: BlockManager) -> int:
        block: int = original(self)
        if block == 0:
            self._free.insert(0, block)
        return block

    return take


def _forgets_the_salt(original: Callable[..., Any]) -> Callable[..., Any]:
    """All salts are the same."""

    def init(
        self: BlockKeys, token_ids: list[int], block_size: int, _: str | None, prompt_bytes: bytes
    ) -> None:
        original(self, token_ids, block_size, None, prompt_bytes)

    return init


def _shares_before_the_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Blocks are offered when they are allocated, not when their step has finished."""

    def take(self: Scheduler, request: Any, budget: int) -> int:
        taken: int = original(self, request, budget)
        end = request.num_computed_tokens + taken
        self._blocks.cache_full_blocks(request.seq_id, request.block_keys, end)
        return taken

    return take


def _latest_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """A preempted request goes to the end of the queue."""

    def preempt(self: Scheduler, request: Any) -> None:
        original(self, request)
        self.waiting.rotate(-1)

    return preempt


def _counts_drafts_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Drafts are computed tokens before they are verified."""

    def complete(self: Scheduler, batch: ScheduledBatch) -> None:
        original(self, batch)
        for request, drafts in batch.drafts.items():
            request.num_computed_tokens += len(drafts)

    return complete


def _plans_as_if_no_draft_stood(original: Callable[..., Any]) -> Callable[..., Any]:
    """The next step's rows may be longer than planned."""

    def advance(self: ScheduledBatch) -> None:
        original(self)
        for request in self.sampling:
            request.num_computed_tokens -= request.num_pending_drafts
            request.num_pending_drafts = 0

    return advance


@pytest.mark.parametrize(
    ("owner", "name", "defect"),
    [
        (BlockManager, "_pop_free", _hands_out_twice),
        (BlockKeys, "__init__", _forgets_the_salt),
        (Scheduler, "_schedule_chunk", _shares_before_the_step),
        (Scheduler, "_preempt", _latest_first),
        (Scheduler, "complete_step", _counts_drafts_at_once),
        (ScheduledBatch, "advance_optimistically", _plans_as_if_no_draft_stood),
    ],
)
def test_a_planted_defect_is_found(
    owner: type, name: str, defect: Callable[..., Callable[..., Any]]
) -> None:
    check_it_is_found(run_histories, owner, name, defect(getattr(owner, name)))
