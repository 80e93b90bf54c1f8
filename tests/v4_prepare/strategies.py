"""Hypothesis strategies: small configurations, and steps with every kind of row that fit them."""

from __future__ import annotations

from math import lcm

import numpy as np
from hypothesis import strategies as st

from fd_dsa.v4_prepare import V4PrepareConfig
from tests.v4_prepare.cases import Step

KINDS = ("idle", "idle_with_cache", "decode", "mtp", "fresh_prompt", "chunk")


@st.composite
def configs(draw: st.DrawFn, **fixed: object) -> V4PrepareConfig:
    """Small sizes: ratios and windows of a few tokens, so that everything wraps soon."""
    csa_ratio, hca_ratio = draw(st.sampled_from([(1, 4), (2, 3), (4, 16), (4, 8), (8, 2)]))
    block_size = lcm(csa_ratio, hca_ratio) * draw(st.sampled_from([1, 2]))
    max_model_len = draw(st.integers(1, 70))
    max_num_seqs = draw(st.integers(1, 5))
    columns = -(-max_model_len // block_size) + draw(st.integers(0, 2))
    values: dict[str, object] = {
        # as wide as a decode row or narrower, too
        "window_size": draw(st.sampled_from([1, 2, 3, 5, 8, 9])),
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
        "swa": draw(st.sampled_from(["ring", "paged"])),
        "comp_base": draw(st.sampled_from([None, 0, 1000])),
        "hca_mode": draw(st.sampled_from(["list", "table"])),
    }
    return V4PrepareConfig(**(values | fixed))  # type: ignore[arg-type]


def _lengths(draw: st.DrawFn, cfg: V4PrepareConfig, most: int) -> tuple[int, int]:
    """ctx and q of one row that may add up to `most` tokens."""
    kind = draw(st.sampled_from(KINDS))
    longest = cfg.max_model_len
    if kind == "idle" or most == 0:
        return 0, 0
    if kind == "idle_with_cache":
        return draw(st.integers(0, longest)), 0
    most = min(most, longest)
    if kind == "decode":
        most = 1
    elif kind == "mtp":
        most = min(most, cfg.spec_tokens + 1)
    q = draw(st.integers(1, most))
    return (q if kind == "fresh_prompt" else draw(st.integers(q, longest))), q


@st.composite
def steps(draw: st.DrawFn, **fixed: object) -> tuple[V4PrepareConfig, Step]:
    """Sizes and a valid step; cells and slots that nobody reads hold anything."""
    cfg = draw(configs(**fixed))
    num_rows = draw(st.integers(0, cfg.max_num_seqs))
    rest, ctx, q = cfg.max_num_tokens, [], []
    for _ in range(num_rows):
        row = _lengths(draw, cfg, min(rest, cfg.max_tokens_per_seq))
        ctx.append(row[0])
        q.append(row[1])
        rest -= row[1]
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    columns = max(1, -(-max(ctx, default=0) // cfg.block_size)) + draw(st.integers(0, 2))
    # blocks may repeat: the builder does not care who else owns them
    table = rng.integers(0, cfg.num_blocks, (num_rows, columns))
    used = -(-np.array(ctx, np.int64) // cfg.block_size) * (np.array(q, np.int64) > 0)
    unused = np.arange(columns) >= used[:, None]
    table[unused] = rng.choice([-1, -(2**31), 2**31 - 1, 0], unused.sum())
    slot = rng.permutation(cfg.num_slots)[:num_rows]
    slot[np.array(q, np.int64) == 0] = rng.choice([-1, 0, 2**31 - 1])
    lengths = (np.array(values, np.int32).reshape(num_rows) for values in (ctx, q, slot))
    return cfg, Step(*lengths, table.astype(np.int32))
