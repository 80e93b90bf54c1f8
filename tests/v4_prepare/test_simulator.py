"""Builders run an engine on tagged memory: every token reads its keys, and nothing else is read.

`make soak` plays new histories each round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fd_dsa.v4_prepare import V4Arrays, V4PrepareConfig, csa_translate, v4_prepare_np
from tests.reference.v4_prepare import naive
from tests.v4_prepare.cases import DEVICES, Place
from tests.v4_prepare.simulator import Sizes, simulate

# a smaller seed is no simpler history
ONCE = (Phase.explicit, Phase.reuse, Phase.generate)
SEEDS = st.integers(0, 2**32 - 1)
NUM_STEPS = 50

kinds = pytest.mark.parametrize("swa", ["ring", "paged"])
drafts = pytest.mark.parametrize("spec_tokens", [0, 1, 2, 3])
ways = pytest.mark.parametrize("by_cells", [False, True], ids=["tables", "cells"])
lateness = pytest.mark.parametrize("late", [False, True], ids=["exact", "rollback"])


def small(seed: int, **changes: Any) -> V4PrepareConfig:
    """Small sizes; how scarce blocks are and where compressed rows start depend on the seed."""
    blocks = {"num_blocks": (16, 22, 40)[seed % 3], "comp_base": (None, 0, 700)[seed // 3 % 3]}
    return V4PrepareConfig(**asdict(Sizes()) | blocks | changes)


def reusing_arrays(cfg: V4PrepareConfig) -> Callable[..., V4Arrays]:
    """The host builder over arrays that are full of garbage at first and used again."""
    out = V4Arrays(cfg, lambda shape, dtype: np.full(shape, 0x5A5A5A5A, dtype))
    return lambda *step: v4_prepare_np(*step, out=out)


class Prepared:
    """`V4Prepare` in a place, as a builder: steps are staged, expanded and read back whole.

    Args:
        by_cells: set the blocks of a row that are new, in place of passing block tables.
    """

    def __init__(self, cfg: V4PrepareConfig, place: Place, by_cells: bool = False) -> None:
        self.place, self.by_cells, self.prepare = place, by_cells, place.prepare(cfg)
        self.blocks: list[list[int]] = [[] for _ in range(cfg.max_num_seqs)]

    def __call__(self, cfg: Any, *inputs: Any) -> dict[str, Any]:
        self.stage(*inputs[:4])
        return self.expand(*inputs[4:])

    def stage(self, ctx: Any, q: Any, slot: Any, table: np.ndarray) -> None:
        """Stage one step."""
        if not self.by_cells:
            self.prepare.stage(ctx, q, slot, table)
            return
        for row, cells in enumerate(table.tolist()):
            old, new = self.blocks[row], [block for block in cells if block >= 0]
            shorter = min(len(old), len(new))
            start = next((i for i in range(shorter) if old[i] != new[i]), shorter)
            if old != new:
                self.prepare.set_blocks(row, new[start:], start)
            self.blocks[row] = new
        self.prepare.stage(ctx, q, slot)

    def expand(self, rollback: np.ndarray | None = None) -> dict[str, Any]:
        """Copies of the outputs of the earliest staged step."""
        self.prepare.expand(None if rollback is None else self.place.put(rollback))
        self.prepare.poll_error()
        return self.place.outputs(self.prepare)


@pytest.mark.slow
@kinds
@drafts
@settings(max_examples=15, phases=ONCE)
@given(seed=SEEDS)
def test_the_host_builder_serves_any_history(swa: str, spec_tokens: int, seed: int) -> None:
    # in table mode the reader takes rows of HCA entries from the block table
    mode, most = ("list", "list", "table")[seed % 3], spec_tokens + 1
    cfg = small(seed, swa=swa, spec_tokens=spec_tokens, hca_mode=mode)
    simulate(cfg, reusing_arrays(cfg), seed, NUM_STEPS, translate=csa_translate)
    # the steps of a graph of decode rows
    sizes = {"max_tokens_per_seq": most, "max_num_tokens": 4 * most}
    cfg = small(seed, swa=swa, spec_tokens=spec_tokens, **sizes)
    simulate(cfg, reusing_arrays(cfg), seed, NUM_STEPS, translate=csa_translate)


@pytest.mark.slow
@kinds
@lateness
@ways
@settings(max_examples=8, phases=ONCE)
@given(seed=SEEDS)
def test_staged_steps_serve_any_history(swa: str, late: bool, by_cells: bool, seed: int) -> None:
    cfg = small(seed, swa=swa, spec_tokens=seed % 4)
    simulate(cfg, Prepared(cfg, Place("numpy"), by_cells), seed, NUM_STEPS, late=late)


@pytest.mark.slow
@kinds
def test_histories_hold_what_an_engine_does(swa: str) -> None:
    num, events = 12, Counter[str]()
    for seed in range(num):
        cfg = small(seed, swa=swa)
        played = simulate(cfg, reusing_arrays(cfg), seed, NUM_STEPS)
        # a seed plays the same history again
        assert seed or played == simulate(cfg, naive, seed, NUM_STEPS)
        events += played
    assert events["steps"] == num * NUM_STEPS
    wanted = ["arrivals", "drafts refused", "empty steps", "hits", "mixed steps", "preemptions"]
    if swa == "ring":
        wanted.append("blocks run again without a window")
    assert not [name for name in wanted if not events[name]], events


DEVICE_SIZES = {"max_num_tokens": 24, "max_tokens_per_seq": 20}
"""An interpreted step takes half a second; these are shorter."""


# the quick tests of steps on a device are test_kernel.py, test_prepare.py and test_table.py
INTERPRETED = pytest.param("interpreter", marks=[pytest.mark.triton, pytest.mark.slow])


@pytest.mark.parametrize("name", [INTERPRETED, *DEVICES[1:]])
@kinds
@drafts
@lateness
def test_the_device_serves_any_history(name: str, swa: str, spec_tokens: int, late: bool) -> None:
    place = Place(name)
    if not place.large and (swa, spec_tokens, late) not in (("ring", 3, True), ("paged", 0, False)):
        pytest.skip("for a GPU: an interpreted step takes half a second")
    modes = [{}, {"hca_mode": "table"}, {"comp_base": 0}] if place.large else [DEVICE_SIZES]
    for changes in modes:
        cfg = small(0, swa=swa, spec_tokens=spec_tokens, **changes)
        # one builder for all: rows, slots and blocks go from one history to the next
        build = Prepared(cfg, place)
        for seed in range(12 if place.large else 1):
            simulate(cfg, build, seed, 50 if place.large else 5, late=late)
