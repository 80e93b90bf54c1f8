"""Hypothesis strategies: small configurations, and steps with every kind of row that fit them."""

from __future__ import annotations

from functools import cache
from math import lcm

import numpy as np
from hypothesis import strategies as st

from fd_dsa.v4_prepare import V4PrepareConfig
from tests.v4_prepare.cases import Step, make_step

# a strategy is made once, since Hypothesis checks each
_RATIOS = st.sampled_from([(1, 4), (2, 3), (4, 16), (4, 8), (8, 2)])
_ONE_OR_TWO = st.sampled_from([1, 2])
# as wide as a decode row or narrower, too
_WINDOWS = st.sampled_from([1, 2, 3, 5, 8, 9])
_SWA = st.sampled_from(["ring", "paged"])
_COMP_BASE = st.sampled_from([None, 0, 1000])
_HCA_MODE = st.sampled_from(["list", "table"])


@st.composite
def configs(draw: st.DrawFn, **fixed: object) -> V4PrepareConfig:
    """Small sizes: ratios and windows of a few tokens, so that everything wraps soon."""
    csa_ratio, hca_ratio = draw(_RATIOS)
    block_size = lcm(csa_ratio, hca_ratio) * draw(_ONE_OR_TWO)
    max_model_len = draw(st.integers(1, 70))
    max_num_seqs = draw(st.integers(1, 5))
    columns = -(-max_model_len // block_size) + draw(st.integers(0, 2))
    values: dict[str, object] = {
        "window_size": draw(_WINDOWS),
        "spec_tokens": draw(st.integers(0, 3)),
        "block_size": block_size,
        "csa_ratio": csa_ratio,
        "hca_ratio": hca_ratio,
        "index_topk": draw(st.integers(1, 6)),
        "num_slots": draw(st.integers(max_num_seqs, 7)),
        "num_blocks": draw(st.integers(1, 60)),
        "max_blocks_per_seq": columns,
        "max_num_seqs": max_num_seqs,
        "max_num_tokens": draw(st.integers(1, 60)),
        "max_tokens_per_seq": draw(st.integers(1, 40)),
        "max_model_len": max_model_len,
        "swa": draw(_SWA),
        "comp_base": draw(_COMP_BASE),
        "hca_mode": draw(_HCA_MODE),
    }
    return V4PrepareConfig(**(values | fixed))  # type: ignore[arg-type]


@cache
def _rows(spec_tokens: int, max_num_seqs: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Tokens before and tokens of the step of each row."""
    new = st.one_of(st.integers(0, spec_tokens + 1), st.integers(0, 40))
    return st.lists(st.tuples(st.integers(0, 70), new), max_size=max_num_seqs)


@st.composite
def steps(draw: st.DrawFn, **fixed: object) -> tuple[V4PrepareConfig, Step]:
    """Sizes and a valid step; cells and slots that nobody reads hold anything."""
    cfg = draw(configs(**fixed))
    rows = draw(_rows(cfg.spec_tokens, cfg.max_num_seqs))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    step = make_step(cfg, rows, rng)
    used = -(-step.ctx // cfg.block_size) * (step.q > 0)
    unused = np.arange(cfg.max_blocks_per_seq) >= used[:, None]
    step.table[unused] = rng.choice([-1, -(2**31), 2**31 - 1, 0], unused.sum())
    step.slot[step.q == 0] = rng.choice([-1, 0, 2**31 - 1])
    return cfg, step
