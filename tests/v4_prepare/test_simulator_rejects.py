"""The simulator finds wrong builders and wrong engines; otherwise its other tests prove nothing.

Each wrong builder spoils one thing in the oracle's arrays. Most of these mistakes were once in a
serving engine: ROCm/ATOM #728 had one window and one number of entries per request, #817 repaired
a ring without room for drafts, #894 a prompt that wrote more rows than its ring has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.reference.v4_prepare import naive
from tests.v4_prepare.simulator import Engine, Request, Sizes, simulate
from tests.v4_prepare.simulator_layers import Violation

pytestmark = pytest.mark.slow

Arrays = dict[str, np.ndarray]


class Built(NamedTuple):
    """Arrays that a mistake spoils: the oracle's of a step. `kept` lives as long as the builder."""

    cfg: Any
    out: Arrays
    slot: np.ndarray
    kept: Arrays

    def rows(self, is_prefill: bool | None = None) -> Iterator[tuple[int, range]]:
        """Row number and tokens of every active row, of one kind or of both."""
        bounds = self.out["cu_q"].tolist()
        for b, (first, end) in enumerate(pairwise(bounds)):
            if end > first and is_prefill in (None, end - first > self.cfg.spec_tokens + 1):
                yield b, range(first, end)

    def recount(self) -> None:
        """The counts agree with the plans again."""
        for i, name in ((4, "plan_r1"), (5, "wplan_r1"), (6, "plan_r2")):
            self.out["counts"][i] = (self.out[name][:, 0] >= 0).sum()


def hca_by_request(made: Built) -> None:
    """All tokens of a request see the entries that its last token sees."""
    out, lists = made.out, [np.zeros(0, np.int32)]
    sums, numbers = out["hca_indptr"], np.zeros(len(out["hca_indptr"]), np.int32)
    for _, tokens in made.rows():
        last = out["hca_idx"][sums[tokens[-1]] : sums[tokens[-1] + 1]]
        lists.extend([last] * len(tokens))
        numbers[tokens[0] + 1 : tokens[-1] + 2] = len(last)
    out["hca_indptr"], out["hca_idx"] = np.cumsum(numbers), np.concatenate(lists)
    out["counts"][2] = out["hca_indptr"][-1]


def window_of_first_token(made: Built) -> None:
    """All tokens of a decode row read the window of the first one."""
    for _, tokens in made.rows(False):
        for name in ("win_idx", "win_len"):
            made.out[name][list(tokens)] = made.out[name][tokens[0]]


def ring_without_drafts(made: Built) -> None:
    """Positions go around in W rows of the ring, not in W + k."""
    cfg, out = made.cfg, made.out
    for b, tokens in made.rows(False) if cfg.swa == "ring" else ():
        first = made.slot[b] * (cfg.window_size + cfg.spec_tokens)
        for t in tokens:
            p = int(out["positions"][t])
            x = np.arange(max(0, p - cfg.window_size + 1), p + 1)
            out["win_idx"][t, : len(x)] = first + x % cfg.window_size
            if out["swa_write"][t] >= 0:
                out["swa_write"][t] = first + p % cfg.window_size


def prefill_writes_every_row(made: Built) -> None:
    """Every token of a prompt chunk writes its row of the ring, not only the last W."""
    ring = made.cfg.window_size + made.cfg.spec_tokens
    for b, tokens in made.rows(True) if made.cfg.swa == "ring" else ():
        positions = made.out["positions"][list(tokens)]
        made.out["swa_write"][list(tokens)] = made.slot[b] * ring + positions % ring


def sources_of_this_step_only(made: Built) -> None:
    """w = 0: entries pool tokens of the step even where their sources came in steps before."""
    for name in ("plan_r1", "plan_r2"):
        made.out[name][made.out[name][:, 0] >= 0, 3] = 0


def stale_plan_tail(made: Built) -> None:
    """Rows of a plan beyond those of this step keep what an earlier step left there."""
    for name in ("r1", "r2"):
        unused = made.out[f"plan_{name}"][:, 0] < 0
        for array in (f"plan_{name}", f"plan_dst_{name}"):
            if array in made.kept:
                made.out[array][unused] = made.kept[array][unused]
            made.kept[array] = made.out[array].copy()


def drafts_finish_no_entry(made: Built) -> None:
    """Only the first token of a decode row finishes an entry."""
    drafts = [t for _, tokens in made.rows(False) for t in tokens[1:]]
    for name in ("r1", "r2"):
        dropped = np.isin(made.out[f"plan_{name}"][:, 0], drafts)
        made.out[f"plan_{name}"][dropped] = made.out[f"plan_dst_{name}"][dropped] = -1
    made.recount()


def sources_of_one_group_kept(made: Built) -> None:
    """The state ring gets the last r1 sources of a step; overlapping entries pool 2 r1."""
    plan = made.out["wplan_r1"]
    plan[plan[:, 2] < made.out["ctx"][plan[:, 1]] - made.cfg.csa_ratio] = -1
    made.recount()


def entries_in_the_next_row(made: Built) -> None:
    """The entry of a token goes where the next token's group belongs."""
    made.out["plan_dst_r1"][made.out["plan_dst_r1"] >= 0] += 1


# mistake -> the lists in which it is found
WRONG: dict[Callable[[Built], None], set[str]] = {
    hca_by_request: {"r2"},
    window_of_first_token: {"window"},
    ring_without_drafts: {"window"},
    prefill_writes_every_row: {"window"},
    sources_of_this_step_only: {"r1", "r2", "sources of r1", "sources of r2"},
    stale_plan_tail: {"layout"},
    drafts_finish_no_entry: {"r1", "r2"},
    sources_of_one_group_kept: {"sources of r1"},
    entries_in_the_next_row: {"r1"},
}
ONLY_IN_RINGS = {ring_without_drafts, prefill_writes_every_row}


def wrong_builder(mistake: Callable[[Built], None]) -> Callable[..., Arrays]:
    """The oracle with a mistake."""
    kept: Arrays = {}

    def build(cfg: Any, ctx: Any, q: Any, slot: Any, table: Any) -> Arrays:
        out = naive(cfg, ctx, q, slot, table)
        mistake(Built(cfg, out, slot, kept))
        return out

    return build


def violations(sizes: Sizes, make: Callable[[], Any], **options: Any) -> list[Violation | None]:
    """Return the end of each of eight histories. `make` gives the builder of a history."""
    found: list[Violation | None] = []
    for seed in range(8):
        try:
            simulate(sizes, make(), seed, 50, **options)
            found.append(None)
        except Violation as violation:
            found.append(violation)
    return found


@pytest.mark.parametrize("swa", ["ring", "paged"])
@pytest.mark.parametrize("mistake", WRONG, ids=lambda mistake: mistake.__name__)
def test_a_wrong_builder_is_found(mistake: Callable[[Built], None], swa: str) -> None:
    found = violations(Sizes(swa=swa), lambda: wrong_builder(mistake))
    if swa == "paged" and mistake in ONLY_IN_RINGS:
        assert found == [None] * len(found)
    else:
        # every history has what the mistake spoils
        assert {getattr(violation, "part", None) for violation in found} <= WRONG[mistake], found


def test_a_violation_says_how_to_see_it_again() -> None:
    with pytest.raises(Violation, match=r"r2: offsets") as caught:
        simulate(Sizes(), wrong_builder(hca_by_request), 3, 50)
    assert caught.value.__notes__[0].startswith("seed 3, step ")


class StartsAfterTheHit(Engine):
    """After a prefix hit, nothing runs again although the ring holds another request's keys."""

    def _take_hit(self, request: Request, hits: list[int]) -> None:
        request.blocks = [self.share(block) for block in hits]
        request.done = len(hits) * self.cfg.block_size
        request.num_cached = len(hits)


class RunsAgainInSharedBlocks(Engine):
    """The last block of a hit runs again, but into the block that others read."""

    def _take_hit(self, request: Request, hits: list[int]) -> None:
        super()._take_hit(request, hits)
        if request.rerun_until:
            request.blocks.append(self.share(request.hit_block))


WRONG_ENGINES = {
    StartsAfterTheHit: {"window", "sources of r1"},
    RunsAgainInSharedBlocks: {"window", "r1", "r2"},
}


@pytest.mark.parametrize("engine", WRONG_ENGINES, ids=lambda engine: engine.__name__)
def test_a_wrong_engine_is_found(engine: type[Engine]) -> None:
    found = [v for v in violations(Sizes(num_blocks=40), lambda: naive, engine=engine) if v]
    assert len(found) >= 2
    assert {violation.part for violation in found} <= WRONG_ENGINES[engine], found
