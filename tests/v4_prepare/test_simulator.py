"""Builders run an engine on tagged memory: every token reads its keys, and nothing else is read.

`make soak` plays new histories each round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fd_dsa.v4_prepare import V4Arrays, V4PrepareConfig, csa_translate, v4_prepare_np
from tests.reference.v4_prepare import naive
from tests.v4_prepare.simulator import REAL, Sizes, simulate
from tests.v4_prepare.simulator_prepare import PreparedSteps
from tests.v4_prepare.simulator_requests import LongContexts

pytestmark = pytest.mark.slow

# a smaller seed is no simpler history
ONCE = (Phase.explicit, Phase.reuse, Phase.generate)
SEEDS = st.integers(0, 2**32 - 1)
NUM_STEPS = 50

kinds = pytest.mark.parametrize("swa", ["ring", "paged"])
drafts = pytest.mark.parametrize("spec_tokens", [0, 1, 2, 3])


def config(sizes: Sizes, **changes: Any) -> V4PrepareConfig:
    """The sizes as the package takes them."""
    return V4PrepareConfig(**asdict(sizes) | changes)


def small(seed: int, **changes: Any) -> V4PrepareConfig:
    """Small sizes; how scarce blocks are and where compressed rows start depend on the seed."""
    num_blocks, comp_base = (16, 22, 40)[seed % 3], (None, 0, 700)[seed // 3 % 3]
    return config(Sizes(), num_blocks=num_blocks, comp_base=comp_base, **changes)


def reusing_arrays(cfg: V4PrepareConfig) -> Callable[..., V4Arrays]:
    """The host builder over arrays that are full of garbage at first and used again."""
    out = V4Arrays(cfg, lambda shape, dtype: np.full(shape, 0x5A5A5A5A, dtype))
    return lambda *step: v4_prepare_np(*step, out=out)


@kinds
@drafts
@settings(max_examples=15, phases=ONCE)
@given(seed=SEEDS)
def test_the_host_builder_serves_any_history(swa: str, spec_tokens: int, seed: int) -> None:
    # in table mode the reader takes rows of HCA entries from the block table
    mode = ("list", "list", "table")[seed % 3]
    cfg = small(seed, swa=swa, spec_tokens=spec_tokens, hca_mode=mode)
    simulate(cfg, reusing_arrays(cfg), seed, NUM_STEPS, translate=csa_translate)


@kinds
@drafts
@settings(max_examples=8, phases=ONCE)
@given(seed=SEEDS)
def test_the_oracle_serves_any_history(swa: str, spec_tokens: int, seed: int) -> None:
    simulate(small(seed, swa=swa, spec_tokens=spec_tokens), naive, seed, NUM_STEPS)


@kinds
@drafts
@settings(max_examples=2, phases=ONCE)
@given(seed=SEEDS)
def test_sizes_of_a_decode_graph_and_of_the_model(swa: str, spec_tokens: int, seed: int) -> None:
    most = spec_tokens + 1
    graph = small(
        seed, swa=swa, spec_tokens=spec_tokens, max_tokens_per_seq=most, max_num_tokens=4 * most
    )
    simulate(graph, reusing_arrays(graph), seed, 3 * NUM_STEPS, translate=csa_translate)
    if spec_tokens in (0, 3):
        cfg = config(REAL, swa=swa, spec_tokens=spec_tokens)
        build = reusing_arrays(cfg)
        simulate(cfg, build, seed, 20, translate=csa_translate, scheduler=LongContexts)


@kinds
@pytest.mark.parametrize("late", [False, True], ids=["exact", "rollback"])
@pytest.mark.parametrize("by_cells", [False, True], ids=["tables", "cells"])
@settings(max_examples=8, phases=ONCE)
@given(seed=SEEDS)
def test_staged_steps_serve_any_history(swa: str, late: bool, by_cells: bool, seed: int) -> None:
    cfg = small(seed, swa=swa, spec_tokens=seed % 4)
    build = PreparedSteps(cfg, by_cells=by_cells)
    simulate(cfg, build, seed, NUM_STEPS, late=late)


def test_a_seed_plays_the_same_history_again() -> None:
    sizes = replace(Sizes(), num_blocks=16)
    played = [simulate(sizes, naive, 11, NUM_STEPS) for _ in range(2)]
    assert played[0] == played[1]
    assert played[0] != simulate(sizes, naive, 12, NUM_STEPS)


@kinds
def test_histories_hold_what_an_engine_does(swa: str) -> None:
    events: Counter[str] = Counter()
    for seed in range(20):
        cfg = small(seed, swa=swa)
        events += simulate(cfg, reusing_arrays(cfg), seed, NUM_STEPS)
    assert events["steps"] == 20 * NUM_STEPS
    wanted = ["arrivals", "caches received", "drafts refused", "empty steps", "hits"]
    wanted += ["mixed steps", "preemptions"]
    if swa == "ring":
        wanted.append("blocks run again without a window")
    assert not [name for name in wanted if not events[name]], events
