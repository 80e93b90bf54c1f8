"""Builders with one mistake each, for the tests of the simulator: it must find every one.

Each takes what the oracle takes, starts from the oracle's arrays and spoils one thing. Most of
these mistakes were once in a serving engine: ROCm/ATOM #728 had one window and one number of
entries per request, #817 repaired a ring without room for drafts, #894 a prompt that wrote more
rows than its ring has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.reference.v4_prepare import naive

Arrays = dict[str, np.ndarray]


def _rows(out: Arrays) -> Iterator[tuple[int, slice]]:
    """Row number and tokens of every active row."""
    for b, (first, end) in enumerate(zip(out["cu_q"][:-1], out["cu_q"][1:], strict=True)):
        if end > first:
            yield b, slice(int(first), int(end))


def _is_prefill(cfg: Any, tokens: slice) -> bool:
    return tokens.stop - tokens.start > cfg.spec_tokens + 1


def hca_by_request(cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
    """All tokens of a request see the entries that its last token sees."""
    out = naive(cfg, ctx, q, slot, block_table)
    lists: list[np.ndarray] = []
    sums = out["hca_indptr"]
    numbers = np.zeros(len(sums), np.int32)
    for _, tokens in _rows(out):
        last = out["hca_idx"][sums[tokens.stop - 1] : sums[tokens.stop]]
        lists.extend([last] * (tokens.stop - tokens.start))
        numbers[tokens.start + 1 : tokens.stop + 1] = len(last)
    out["hca_indptr"] = np.cumsum(numbers, dtype=np.int32)
    out["hca_idx"] = np.concatenate([*lists, np.zeros(0, np.int32)])
    out["counts"][2] = out["hca_indptr"][-1]
    return out


def window_of_first_token(cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
    """All tokens of a decode row read the window of the first one."""
    out = naive(cfg, ctx, q, slot, block_table)
    for _, tokens in _rows(out):
        if not _is_prefill(cfg, tokens):
            out["win_idx"][tokens] = out["win_idx"][tokens.start]
            out["win_len"][tokens] = out["win_len"][tokens.start]
    return out


def full_window_of_first_token(cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
    """The same mistake with lengths of each token: short windows hold as many keys as they must."""
    out = window_of_first_token(cfg, ctx, q, slot, block_table)
    for _, tokens in _rows(out):
        if not _is_prefill(cfg, tokens):
            for t in range(tokens.start, tokens.stop):
                length = min(int(out["positions"][t]) + 1, cfg.window_size)
                cells = out["win_idx"][t]
                cells[out["win_len"][t] : length] = cells[0]
                out["win_len"][t] = length
    return out


def ring_without_drafts(cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
    """Positions go around in W rows of the ring, not in W + k."""
    out = naive(cfg, ctx, q, slot, block_table)
    if cfg.swa != "ring":
        return out
    width, ring = cfg.window_size, cfg.window_size + cfg.spec_tokens
    for b, tokens in _rows(out):
        for t in range(tokens.start, tokens.stop):
            p = int(out["positions"][t])
            oldest = max(0, p - width + 1)
            x = np.arange(oldest, oldest + int(out["win_len"][t]))
            out["win_idx"][t, : len(x)] = slot[b] * ring + x % width
            if out["swa_write"][t] >= 0:
                out["swa_write"][t] = slot[b] * ring + p % width
    return out


def sources_of_this_step_only(cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
    """w = 0: entries pool tokens of the step even where their sources came in steps before."""
    out = naive(cfg, ctx, q, slot, block_table)
    for name in ("plan_r1", "plan_r2"):
        plan = out[name]
        plan[plan[:, 0] >= 0, 3] = 0
    return out


class StalePlanTail:
    """Rows of a plan beyond those of this step keep what an earlier step left there."""

    def __init__(self) -> None:
        self.before: Arrays = {}

    def __call__(self, cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
        out = naive(cfg, ctx, q, slot, block_table)
        for name in ("r1", "r2"):
            unused = out[f"plan_{name}"][:, 0] < 0
            for array in (f"plan_{name}", f"plan_dst_{name}"):
                if self.before:
                    out[array][unused] = self.before[array][unused]
        self.before = {name: array.copy() for name, array in out.items()}
        return out


class StalePlanTailCounted(StalePlanTail):
    """The same, and the counts of the plans agree with it."""

    def __call__(self, cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
        out = super().__call__(cfg, ctx, q, slot, block_table)
        for i, name in ((4, "plan_r1"), (6, "plan_r2")):
            out["counts"][i] = (out[name][:, 0] >= 0).sum()
        return out


def prefill_writes_every_row(cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
    """Every token of a prompt chunk writes its row of the ring, not only the last W."""
    out = naive(cfg, ctx, q, slot, block_table)
    ring = cfg.window_size + cfg.spec_tokens
    for b, tokens in _rows(out):
        if cfg.swa == "ring" and _is_prefill(cfg, tokens):
            out["swa_write"][tokens] = slot[b] * ring + out["positions"][tokens] % ring
    return out


def prefill_reads_own_keys_from_ring(
    cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any
) -> Arrays:
    """A prompt chunk reads its own keys where a decode row does, before they are written."""
    out = naive(cfg, ctx, q, slot, block_table)
    ring = cfg.window_size + cfg.spec_tokens
    for b, tokens in _rows(out):
        if cfg.swa != "ring" or not _is_prefill(cfg, tokens):
            continue
        for t in range(tokens.start, tokens.stop):
            p = int(out["positions"][t])
            x = np.arange(max(0, p - cfg.window_size + 1), p + 1)
            out["win_idx"][t, : len(x)] = slot[b] * ring + x % ring
            out["win_len"][t], out["ext_len"][t] = len(x), 0
    return out


class KeysAreWrittenOnce:
    """A position that a refused draft wrote is not written again by the token that replaces it."""

    def __init__(self) -> None:
        self.written: dict[int, int] = {}

    def __call__(self, cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
        out = naive(cfg, ctx, q, slot, block_table)
        for b, tokens in _rows(out):
            owner, start = int(slot[b]), int(out["positions"][tokens.start])
            known = self.written.get(owner, 0)
            # the next owner of a slot starts far below, a row that refused drafts does not
            if 0 < known - start <= cfg.spec_tokens and not _is_prefill(cfg, tokens):
                out["swa_write"][tokens][: known - start] = -1
            self.written[owner] = int(ctx[b])
        return out


def drafts_finish_no_entry(cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
    """Only the first token of a decode row finishes an entry."""
    out = naive(cfg, ctx, q, slot, block_table)
    firsts = {tokens.start for _, tokens in _rows(out) if not _is_prefill(cfg, tokens)}
    prompts = [range(s.start, s.stop) for _, s in _rows(out) if _is_prefill(cfg, s)]
    kept = firsts.union(*prompts) | {-1}
    for i, name in ((4, "r1"), (6, "r2")):
        plan, rows = out[f"plan_{name}"], out[f"plan_dst_{name}"]
        dropped = np.array([t not in kept for t in plan[:, 0].tolist()], bool)
        plan[dropped], rows[dropped] = -1, -1
        out["counts"][i] = (plan[:, 0] >= 0).sum()
    return out


def sources_of_one_group_kept(cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
    """The state ring gets the last r1 sources of a step; overlapping entries pool 2 r1."""
    out = naive(cfg, ctx, q, slot, block_table)
    plan = out["wplan_r1"]
    for row in plan[plan[:, 0] >= 0]:
        if row[2] < out["ctx"][row[1]] - cfg.csa_ratio:
            plan[plan[:, 0] == row[0]] = -1
    out["counts"][5] = (plan[:, 0] >= 0).sum()
    return out


def entries_in_the_next_row(cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
    """The entry of a token goes where the next token's group belongs."""
    out = naive(cfg, ctx, q, slot, block_table)
    out["plan_dst_r1"][out["plan_dst_r1"] >= 0] += 1
    return out


def table_of_another_row(cfg: Any, ctx: Any, q: Any, slot: Any, block_table: Any) -> Arrays:
    """Entries of ratio 2 are read through the block table of the row before."""
    out = naive(cfg, ctx, q, slot, block_table)
    tables = np.roll(np.asarray(block_table), 1, axis=0) if len(ctx) else block_table
    out["hca_idx"] = naive(cfg, ctx, q, slot, tables)["hca_idx"]
    return out
