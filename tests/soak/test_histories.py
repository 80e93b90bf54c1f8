"""Random request histories: nothing breaks an invariant, and what does break one is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fd_dsa.engine.block_manager import BlockKeys, BlockManager
from fd_dsa.engine.scheduler import Scheduler
from tests.soak.histories import run_histories


def test_random_histories_keep_every_invariant() -> None:
    counts = run_histories(first=1_000_000, count=60)
    # a history in which nothing happens would keep them too
    for what in (
        "aborted outputs",
        "accepted drafts",
        "evicted blocks",
        "failed steps",
        "outputs with an error",
        "preemptions",
        "prompt tokens from the prefix cache",
    ):
        assert counts[what] > 0, what


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

    def init(self: BlockKeys, token_ids: list[int], block_size: int, _: str | None) -> None:
        original(self, token_ids, block_size, None)

    return init


def _shares_before_the_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Blocks are offered when they are allocated, not when their step has finished."""

    def take(self: Scheduler, request: Any, budget: int) -> int:
        taken: int = original(self, request, budget)
        end = request.num_computed_tokens + taken
        self._blocks.cache_full_blocks(request.arrival, request.block_keys, end)
        return taken

    return take


def _latest_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """A preempted request goes to the end of the queue."""

    def preempt(self: Scheduler, request: Any) -> None:
        original(self, request)
        self._waiting.rotate(-1)

    return preempt


def _counts_drafts_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Drafts are computed tokens before they are verified."""

    def complete(self: Scheduler) -> None:
        original(self)
        for request, drafts in self.drafts.items():
            request.num_computed_tokens += len(drafts)

    return complete


@pytest.mark.parametrize(
    ("owner", "name", "defect"),
    [
        (BlockManager, "_take_free", _hands_out_twice),
        (BlockKeys, "__init__", _forgets_the_salt),
        (Scheduler, "_take", _shares_before_the_step),
        (Scheduler, "_preempt", _latest_first),
        (Scheduler, "complete_step", _counts_drafts_at_once),
    ],
)
def test_a_planted_defect_is_found(
    owner: type, name: str, defect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, defect(getattr(owner, name)))
    with pytest.raises((AssertionError, IndexError, KeyError)):
        run_histories(first=0, count=200)
