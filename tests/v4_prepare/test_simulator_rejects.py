"""The simulator finds wrong builders and wrong engines; otherwise its other tests prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.reference.v4_prepare import naive
from tests.v4_prepare import wrong_builders
from tests.v4_prepare.simulator import Sizes, simulate
from tests.v4_prepare.simulator_memory import Violation
from tests.v4_prepare.simulator_requests import Request, Scheduler

OTHER_KEYS = {"wrong position", "old version", "foreign key", "freed row", "unwritten row"}
# mistake -> where it is found, and as what
WRONG: dict[Callable[..., Any], tuple[set[str], set[str]]] = {
    wrong_builders.hca_by_request: ({"r2"}, {"extra key"}),
    wrong_builders.window_of_first_token: ({"window"}, {"missing key", "wrong position"}),
    wrong_builders.full_window_of_first_token: ({"window"}, {"wrong position"}),
    wrong_builders.ring_without_drafts: ({"window"}, OTHER_KEYS),
    wrong_builders.sources_of_this_step_only: (
        {"r1", "r2", "sources of r1", "sources of r2"},
        {"out of the step", *OTHER_KEYS},
    ),
    wrong_builders.StalePlanTail: ({"layout"}, {"wrong value"}),
    wrong_builders.StalePlanTailCounted: ({"r1", "r2"}, {"stale plan", "entry twice"}),
    wrong_builders.prefill_writes_every_row: ({"window"}, {"two writers"}),
    wrong_builders.prefill_reads_own_keys_from_ring: ({"window"}, OTHER_KEYS),
    wrong_builders.KeysAreWrittenOnce: ({"window"}, OTHER_KEYS),
    wrong_builders.drafts_finish_no_entry: ({"r1", "r2"}, {"entry missing"}),
    wrong_builders.sources_of_one_group_kept: ({"sources of r1"}, OTHER_KEYS),
    wrong_builders.entries_in_the_next_row: (
        {"r1"},
        {"out of the pool", "foreign write", *OTHER_KEYS},
    ),
    wrong_builders.table_of_another_row: ({"r2"}, {"out of the pool", *OTHER_KEYS}),
}
ONLY_IN_RINGS = (
    wrong_builders.ring_without_drafts,
    wrong_builders.prefill_writes_every_row,
    wrong_builders.prefill_reads_own_keys_from_ring,
)


def _violations(sizes: Sizes, make: Callable[[], Any], **kwargs: Any) -> list[Violation | None]:
    """What each of eight histories ends with; `make` gives the builder of a history."""
    found: list[Violation | None] = []
    for seed in range(8):
        try:
            simulate(sizes, make(), seed, 50, **kwargs)
            found.append(None)
        except Violation as violation:
            found.append(violation)
    return found


@pytest.mark.parametrize("swa", ["ring", "paged"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_builder_is_found(wrong: Callable[..., Any], swa: str) -> None:
    make = wrong if isinstance(wrong, type) else lambda: wrong
    found = _violations(Sizes(swa=swa), make)
    if swa == "paged" and wrong in ONLY_IN_RINGS:
        assert found == [None] * len(found)
        return
    parts, kinds = WRONG[wrong]
    for violation in found:
        # every history has what the mistake spoils
        assert violation is not None
        assert violation.part in parts, violation
        assert violation.kind in kinds, violation


def test_a_violation_says_how_to_see_it_again() -> None:
    with pytest.raises(Violation, match=r"(?s)r2: extra key: .*seed 3, step \d+, swa ring, k 3\n"):
        simulate(Sizes(), wrong_builders.hca_by_request, 3, 50)


def test_a_refused_draft_is_another_key_than_the_token_that_replaces_it() -> None:
    found = _violations(Sizes(), wrong_builders.KeysAreWrittenOnce)
    assert "old version" in {violation.kind for violation in found if violation}


class StartsBehindTheHit(Scheduler):
    """After a prefix hit, nothing runs again although the ring holds another request's keys."""

    def _take_hit(self, request: Request, hits: list[int]) -> None:
        request.blocks = [self.blocks.share(block) for block in hits]
        request.done = len(hits) * self.cfg.block_size
        request.num_cached = len(hits)


class RunsAgainInSharedBlocks(Scheduler):
    """The last block of a hit runs again, but into the block that others read."""

    def _take_hit(self, request: Request, hits: list[int]) -> None:
        super()._take_hit(request, hits)
        if request.rerun_until:
            request.blocks.append(self.blocks.share(request.hit_block))


class RunsLastGroupAgain(Scheduler):
    """With pages, the last r1 tokens of a hit run again for the sources of the next entry."""

    def _take_hit(self, request: Request, hits: list[int]) -> None:
        super()._take_hit(request, hits)
        if hits:
            # the state ring belongs to the previous request of the slot
            self.memory.free_slot(request.slot)
            self.memory.slot_owner[request.slot] = request.handle
            request.done -= self.cfg.csa_ratio


class ForgetsToFree(Scheduler):
    """A slot goes to the next request while the one before still runs."""

    def _admit(self, request: Request) -> None:
        super()._admit(request)
        self.free_slots.insert(0, request.slot)


WRONG_ENGINES = {
    StartsBehindTheHit: ({"window", "sources of r1"}, OTHER_KEYS),
    RunsAgainInSharedBlocks: ({"window", "r1", "r2"}, {"foreign write", "two writers"}),
    RunsLastGroupAgain: (
        {"sources of r1", "sources of r2", "window", "r1", "r2"},
        {"foreign write", "two writers", *OTHER_KEYS},
    ),
    ForgetsToFree: (
        {"window", "sources of r1", "r1"},
        {"foreign write", "two writers", *OTHER_KEYS},
    ),
}


@pytest.mark.parametrize("engine", WRONG_ENGINES, ids=lambda engine: engine.__name__)
def test_a_wrong_engine_is_found(engine: type[Scheduler]) -> None:
    swa = "paged" if engine is RunsLastGroupAgain else "ring"
    sizes = replace(Sizes(swa=swa), num_blocks=40)
    found = [v for v in _violations(sizes, lambda: naive, scheduler=engine) if v]
    assert len(found) >= 2
    parts, kinds = WRONG_ENGINES[engine]
    for violation in found:
        assert violation.part in parts, violation
        assert violation.kind in kinds, violation
