"""Oracle of the index arrays of a DeepSeek-V4 attention step: one token at a time, in loops.

Every list is built by appending and padded at the end; prefix sums are running sums. Public
sources: the causal rule of the compressed entries is that of Hugging Face transformers
(models/deepseek_v4), a ring of window + drafts rows and a state ring of pool + drafts rows are
those of ROCm/ATOM #817 and #894. Counts are per token, which ROCm/ATOM #728 did per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PLAN_PAD = [-1, -1, -1, -1]


def naive(
    cfg: Any,
    ctx: Sequence[int],
    q: Sequence[int],
    slot: Sequence[int],
    block_table: Sequence[Sequence[int]],
) -> dict[str, np.ndarray]:
    """All outputs of one step, int32, padded to the capacities of `cfg`.

    `cfg` is any object with the fields of V4PrepareConfig. `hca_idx` alone is not padded: it has
    exactly counts[2] numbers, also where the builder under test leaves the list out. Inputs are
    not checked.

    Args:
        ctx: [B] tokens of each row after this step.
        q: [B] tokens of each row in this step; 0 for an idle row.
        slot: [B] state slot of each row; ignored where q is 0.
        block_table: [B, columns] physical block of each block of a row.
    """
    step = _Step(cfg)
    for b in range(len(ctx)):
        num_new = int(q[b])
        row = _Row(cfg, b, int(ctx[b]), num_new, int(slot[b]), [int(x) for x in block_table[b]])
        step.out["ctx"].append(row.ctx)
        for j in range(num_new):
            _add_token(step, row, j)
        step.out["cu_q"].append(len(step.out["positions"]))
    return step.padded(len(ctx))


class _Row:
    """One request of the step and where its keys lie."""

    def __init__(
        self, cfg: Any, number: int, ctx: int, q: int, slot: int, blocks: list[int]
    ) -> None:
        self.cfg, self.number, self.ctx, self.q = cfg, number, ctx, q
        self.slot, self.blocks = slot, blocks
        self.start = ctx - q
        self.is_prefill = q > cfg.spec_tokens + 1

    def window_row(self, position: int) -> int:
        """Row of the window pool that holds the key of `position`."""
        cfg = self.cfg
        if cfg.swa == "ring":
            num_rows = cfg.window_size + cfg.spec_tokens
            return self.slot * num_rows + position % num_rows
        return self.blocks[position // cfg.block_size] * cfg.block_size + position % cfg.block_size

    def compressed_row(self, entry: int, ratio: int) -> int:
        """Row of the compressed pool that holds entry number `entry` of `ratio`."""
        cfg = self.cfg
        base = cfg.comp_base
        if base is None and cfg.swa == "ring":
            base = cfg.num_slots * (cfg.window_size + cfg.spec_tokens)
        elif base is None:
            base = cfg.num_blocks * cfg.block_size
        per_block = cfg.block_size // ratio
        return base + self.blocks[entry // per_block] * per_block + entry % per_block


class _Step:
    """The lists that grow while the tokens of the step are visited in order."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.out: dict[str, list[Any]] = {
            "positions": [],
            "req_of_token": [],
            "cu_q": [0],
            "ctx": [],
            "win_idx": [],
            "win_len": [],
            "ext_len": [],
            "swa_write": [],
            "hca_indptr": [0],
            "hca_idx": [],
            "csa_visible": [],
            "csa_indptr": [0],
            "plan_r1": [],
            "plan_dst_r1": [],
            "wplan_r1": [],
            "plan_r2": [],
            "plan_dst_r2": [],
            "wplan_r2": [],
        }

    def padded(self, num_rows: int) -> dict[str, np.ndarray]:
        """The lists as arrays of their capacities, and the counts."""
        cfg, out = self.cfg, self.out
        num_tokens = len(out["positions"])
        plans = [len(out[name]) for name in ("plan_r1", "wplan_r1", "plan_r2", "wplan_r2")]
        sums = [out["hca_indptr"][-1], out["csa_indptr"][-1]]
        tokens, rows = cfg.max_num_tokens, cfg.max_num_seqs
        _pad(out["positions"], tokens, 0)
        _pad(out["req_of_token"], tokens, -1)
        _pad(out["cu_q"], rows + 1, num_tokens)
        _pad(out["ctx"], rows, 0)
        _pad(out["win_idx"], tokens, [-1] * cfg.window_size)
        _pad(out["win_len"], tokens, 0)
        _pad(out["ext_len"], tokens, 0)
        _pad(out["swa_write"], tokens, -1)
        _pad(out["hca_indptr"], tokens + 1, sums[0])
        _pad(out["csa_visible"], tokens, 0)
        _pad(out["csa_indptr"], tokens + 1, sums[1])
        for name, ratio, num_sources in _compressors(cfg):
            num_entries = plan_capacity(cfg, ratio)
            _pad(out[f"plan_{name}"], num_entries, PLAN_PAD)
            _pad(out[f"plan_dst_{name}"], num_entries, -1)
            _pad(out[f"wplan_{name}"], wplan_capacity(cfg, num_sources), PLAN_PAD)
        arrays = {name: np.array(values, np.int32) for name, values in out.items()}
        arrays["counts"] = np.array([num_rows, num_tokens, *sums, *plans], np.int32)
        return arrays


def _add_token(step: _Step, row: _Row, j: int) -> None:
    """Append what token number `j` of `row` reads, writes, finishes and leaves behind."""
    cfg, out = row.cfg, step.out
    t, p = len(out["positions"]), row.start + j
    out["positions"].append(p)
    out["req_of_token"].append(row.number)

    oldest = max(0, p - cfg.window_size + 1)
    newest = row.start - 1 if row.is_prefill else p
    window = [row.window_row(x) for x in range(oldest, newest + 1)]
    out["win_len"].append(len(window))
    out["win_idx"].append(window + [-1] * (cfg.window_size - len(window)))
    out["ext_len"].append(min(j + 1, cfg.window_size) if row.is_prefill else 0)
    keeps_last = cfg.swa == "ring" and row.is_prefill
    is_lost = keeps_last and p < row.ctx - cfg.window_size
    out["swa_write"].append(-1 if is_lost else row.window_row(p))

    num_hca = (p + 1) // cfg.hca_ratio
    out["hca_idx"].extend(row.compressed_row(e, cfg.hca_ratio) for e in range(num_hca))
    out["hca_indptr"].append(out["hca_indptr"][-1] + num_hca)
    num_csa = (p + 1) // cfg.csa_ratio
    out["csa_visible"].append(num_csa)
    out["csa_indptr"].append(out["csa_indptr"][-1] + min(num_csa, cfg.index_topk))

    for name, ratio, num_sources in _compressors(cfg):
        from_ring = num_sources - min(j + 1, num_sources)
        work = [t, row.number, p, from_ring]
        if (p + 1) % ratio == 0:
            out[f"plan_{name}"].append(work)
            out[f"plan_dst_{name}"].append(row.compressed_row(p // ratio, ratio))
        if p >= row.ctx - num_sources:
            out[f"wplan_{name}"].append(work)


def _compressors(cfg: Any) -> list[tuple[str, int, int]]:
    """Name, ratio and number of pooled tokens of the two compressors."""
    return [("r1", cfg.csa_ratio, 2 * cfg.csa_ratio), ("r2", cfg.hca_ratio, cfg.hca_ratio)]


def plan_capacity(cfg: Any, ratio: int) -> int:
    """Most entries of `ratio` that one step can finish."""
    per_row = -(-cfg.max_tokens_per_seq // ratio)
    rows = cfg.max_num_seqs
    return min(rows * per_row, rows + cfg.max_num_tokens // ratio)


def wplan_capacity(cfg: Any, num_sources: int) -> int:
    """Most sources that one step can leave in the state rings."""
    per_row = min(cfg.max_tokens_per_seq, num_sources)
    return min(cfg.max_num_tokens, cfg.max_num_seqs * per_row)


def _pad(values: list[Any], length: int, pad: Any) -> None:
    """Append `pad` up to `length`, which the values must not exceed."""
    if len(values) > length:
        raise AssertionError(f"{len(values)} values, room for {length}")
    values.extend([pad] * (length - len(values)))
