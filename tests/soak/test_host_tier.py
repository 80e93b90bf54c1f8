"""Random histories with evicted blocks in host memory, and defects that they find."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.host_tier import HostTier
from fd_dsa.runner.rank_blocks import DividedBlockStore
from tests.soak.host_tier import run_histories
from tests.soak.planted import check_it_is_found


def check_counts(first: int, count: int) -> None:
    """Run histories, in which the things to test must happen."""
    counts = run_histories(first, count)
    for what in (
        "aborted outputs",
        "accepted drafts",
        "evicted blocks",
        "failed steps",
        "preemptions",
        "prompt tokens from host memory",
        "the same on several ranks",
        "steps while a request waits for copies",
    ):
        assert counts[what] > 0, what


def test_late_copies_change_no_output() -> None:
    check_counts(first=2_000_000, count=24)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_late_copies_change_no_output_of_many_histories() -> None:
    check_counts(first=3_000_000, count=75)


def _waits_for_no_copy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Steps wait for no copy."""
    return lambda self, blocks: None


def _saves_after_loads(original: Callable[..., Any]) -> Callable[..., Any]:
    """Blocks are overwritten before they are saved."""

    def enqueue(self: HostTier) -> None:
        self._copies = deque(sorted(self._copies, key=lambda copy: not copy.loads))
        original(self)

    return enqueue


def _gathers_nothing(original: Callable[..., Any]) -> Callable[..., Any]:
    """A rank has only its own part of what was loaded."""
    return lambda self, number: self._share.precede(number)


def _keeps_what_is_freed(original: Callable[..., Any]) -> Callable[..., Any]:
    """A request that has lost its blocks while they were copied goes on with them."""

    def free(self: BlockManager, seq_id: int) -> None:
        kept = self.reservations.get(seq_id)
        original(self, seq_id)
        if kept is not None:
            self.reservations[seq_id] = kept

    return free


@pytest.mark.parametrize(
    ("owner", "name", "defect", "first"),
    [
        (HostTier, "give", _waits_for_no_copy, 0),
        (HostTier, "enqueue", _saves_after_loads, 0),
        (DividedBlockStore, "precede", _gathers_nothing, 0),
        (BlockManager, "free", _keeps_what_is_freed, 120),
    ],
)
def test_a_planted_defect_is_found(
    owner: type, name: str, defect: Callable[..., Callable[..., Any]], first: int
) -> None:
    check_it_is_found(run_histories, owner, name, defect(getattr(owner, name)), first)
