"""Two ways to prepare a V4 decode step on the host: a loop over tokens, and vectorised NumPy.

Both fill all arrays of `fd_dsa.v4_prepare` for decode rows with window rings, except `ext_len`,
which is zero there. The vectorised form is that of ROCm/ATOM #728, put into our own words: window
by broadcasting, lists by repeat, cumulative sums and a gather, plans by a mask over the tokens. Two
of its rules would give wrong rows with drafts and are replaced by the right ones, at no cost to it:
its window belongs to a request's first token, here to each token; its count of compressed entries
is that of the request's last token, here again each token's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4PrepareConfig

Array = np.ndarray
# group -> its arrays; the vectorised form copies group by group
GROUPS = {
    "tokens": ("positions", "req_of_token", "win_len", "swa_write", "csa_visible"),
    "offsets": ("cu_q", "ctx", "hca_indptr", "csa_indptr", "counts"),
    "window": ("win_idx",),
    "plans": ("plan_r1", "plan_dst_r1", "wplan_r1", "plan_r2", "plan_dst_r2", "wplan_r2"),
    "entries": ("hca_idx",),
}
NAMES = tuple(name for names in GROUPS.values() for name in names)
_PADS = {"req_of_token": -1, "swa_write": -1}


class HostArrays:
    """The arrays of a step in host memory, each group one piece.

    Args:
        config: sizes of the steps.
        allocate: number of values -> int32 memory.

    Attributes:
        groups: group -> int32 [n].
        arrays: name -> view of its group.
    """

    def __init__(self, config: V4PrepareConfig, allocate: Callable[[int], Array]) -> None:
        self.groups: dict[str, Array] = {}
        self.arrays: dict[str, Array] = {}
        every = OUTPUT_SHAPES(config)
        for group, names in GROUPS.items():
            lengths = [int(np.prod(every[name])) for name in names]
            memory = self.groups[group] = allocate(sum(lengths))
            memory.fill(0)
            for name, end, length in zip(names, np.cumsum(lengths), lengths, strict=True):
                self.arrays[name] = memory[end - length : end].reshape(every[name])

    def used(self, name: str) -> int:
        """Values of an array, or of a group, that a copy must move."""
        if name in ("entries", "hca_idx"):
            return int(self.arrays["counts"][2])
        return self.groups[name].size if name in self.groups else self.arrays[name].size


class Loop:
    """A loop over tokens that writes slices of preallocated arrays.

    Args:
        config: sizes of the steps, with window rings.
        out: where the arrays are written.
    """

    def __init__(self, config: V4PrepareConfig, out: HostArrays) -> None:
        self._config, self._out = config, out.arrays
        rows = config.window_size + config.spec_tokens
        self._ring = np.arange(2 * rows, dtype=np.int32) % rows
        self._rows = rows

    def build(self, ctx: Array, q: Array, slot: Array, block_table: Array) -> None:
        """Fill all arrays for a step: int32 [B] three times, and [B, columns]."""
        config, out = self._config, self._out
        window, r1, r2 = config.window_size, config.csa_ratio, config.hca_ratio
        win_idx, hca_idx = out["win_idx"], out["hca_idx"]
        columns: dict[str, list[int]] = {name: [] for name in GROUPS["tokens"]}
        cu_q, hca_indptr, csa_indptr = [0], [0], [0]
        plans = [_Plan(config, block_table, name) for name in ("r1", "r2")]
        t = hca = csa = 0
        lengths = zip(ctx.tolist(), q.tolist(), slot.tolist(), strict=True)
        for b, (end, tokens, owner) in enumerate(lengths):
            ring = owner * self._rows
            entries = compressed_rows(config, block_table[b], end // r2, r2)
            for p in range(end - tokens, end):
                low = max(0, p - window + 1)
                held, first = p + 1 - low, low % self._rows
                np.add(self._ring[first : first + held], ring, out=win_idx[t, :held])
                if held < window:
                    win_idx[t, held:] = -1
                listed, visible = (p + 1) // r2, (p + 1) // r1
                hca_idx[hca : hca + listed] = entries[:listed]
                hca += listed
                csa += min(visible, config.index_topk)
                hca_indptr.append(hca)
                csa_indptr.append(csa)
                columns["positions"].append(p)
                columns["req_of_token"].append(b)
                columns["win_len"].append(held)
                columns["swa_write"].append(ring + p % self._rows)
                columns["csa_visible"].append(visible)
                for plan in plans:
                    plan.token(t, b, p, end, tokens)
                t += 1
            cu_q.append(t)
        win_idx[t:] = -1
        columns |= {"cu_q": cu_q, "hca_indptr": hca_indptr, "csa_indptr": csa_indptr}
        for name, values in columns.items():
            fill(out[name], values, values[-1] if name in GROUPS["offsets"] else _PADS.get(name, 0))
        fill(out["ctx"], ctx, 0)
        counts = [count for plan in plans for count in plan.write(out)]
        out["counts"][:] = [len(ctx), t, hca, csa, *counts]


class _Plan:
    """The plans of one ratio as lists."""

    def __init__(self, config: V4PrepareConfig, block_table: Array, name: str) -> None:
        self._name, self._table, self._base = name, block_table, config.comp_base
        self._ratio = config.csa_ratio if name == "r1" else config.hca_ratio
        self._pooled = config.pool(self._ratio)
        self._each = config.block_size // self._ratio
        self._rows: list[tuple[int, int, int, int]] = []
        self._places: list[int] = []
        self._sources: list[tuple[int, int, int, int]] = []

    def token(self, t: int, b: int, p: int, end: int, tokens: int) -> None:
        """Note what token t, at position p of row b, finishes and keeps for later steps."""
        finishes, kept = (p + 1) % self._ratio == 0, p >= end - self._pooled
        if not finishes and not kept:
            return
        row = t, b, p, self._pooled - min(p - (end - tokens) + 1, self._pooled)
        if finishes:
            block, place = divmod(p // self._ratio, self._each)
            self._rows.append(row)
            self._places.append(self._base + int(self._table[b, block]) * self._each + place)
        if kept:
            self._sources.append(row)

    def write(self, out: dict[str, Array]) -> tuple[int, int]:
        """Fill the arrays of this ratio, -1 after the last row; rows of both plans."""
        fill(out[f"plan_{self._name}"], self._rows, -1)
        fill(out[f"plan_dst_{self._name}"], self._places, -1)
        fill(out[f"wplan_{self._name}"], self._sources, -1)
        return len(self._rows), len(self._sources)


class Vectorised:
    """The vectorised form; `first` leaves the plans and the entries to `second`.

    In between, copies of what `first` made may begin, which is how the original overlaps them
    with work of the host.

    Args:
        config: sizes of the steps, with window rings.
        out: where the arrays are written.
    """

    def __init__(self, config: V4PrepareConfig, out: HostArrays) -> None:
        self._config, self._out = config, out.arrays
        self._arange = np.arange(config.window_size, dtype=np.int32)
        self._req = self._positions = np.empty(0, np.int32)

    def build(self, ctx: Array, q: Array, slot: Array, block_table: Array) -> None:
        """Fill all arrays for a step: int32 [B] three times, and [B, columns]."""
        self.first(ctx, q, slot)
        self.second(ctx, q, block_table)

    def first(self, ctx: Array, q: Array, slot: Array) -> None:
        """Fill what belongs to tokens, offsets and windows."""
        config, out = self._config, self._out
        ring = config.window_size + config.spec_tokens
        cu_q = np.zeros(len(q) + 1, np.int32)
        np.cumsum(q, out=cu_q[1:])
        t = int(cu_q[-1])
        req = np.repeat(np.arange(len(q), dtype=np.int32), q)
        positions = np.arange(t, dtype=np.int32) + (ctx - q - cu_q[:-1])[req]
        base = (slot * ring)[req]
        low = np.maximum(positions - config.window_size + 1, 0)
        at = low[:, None] + self._arange
        out["win_idx"][:t] = np.where(at <= positions[:, None], at % ring + base[:, None], -1)
        out["win_idx"][t:] = -1
        visible = (positions + 1) // config.csa_ratio
        fill(out["positions"], positions, 0)
        fill(out["req_of_token"], req, -1)
        fill(out["win_len"], np.minimum(positions + 1, config.window_size), 0)
        fill(out["swa_write"], base + positions % ring, -1)
        fill(out["csa_visible"], visible, 0)
        fill(out["cu_q"], cu_q, t)
        fill(out["ctx"], ctx, 0)
        hca = offsets(out["hca_indptr"], (positions + 1) // config.hca_ratio)
        csa = offsets(out["csa_indptr"], np.minimum(visible, config.index_topk))
        out["counts"][:4] = len(q), t, hca, csa
        for place, ratio in ((4, config.csa_ratio), (6, config.hca_ratio)):
            out["counts"][place] = (ctx // ratio - (ctx - q) // ratio).sum()
            out["counts"][place + 1] = np.minimum(q, config.pool(ratio)).sum()
        self._req, self._positions = req, positions

    def second(self, ctx: Array, q: Array, block_table: Array) -> None:
        """Fill the plans and the compressed entries of the step that `first` began."""
        config, out, req, positions = self._config, self._out, self._req, self._positions
        t = len(positions)
        tokens = np.arange(t, dtype=np.int32)
        number = positions - (ctx - q)[req]
        for name, ratio in (("r1", config.csa_ratio), ("r2", config.hca_ratio)):
            pooled = config.pool(ratio)
            from_ring = pooled - np.minimum(number + 1, pooled)
            rows = np.stack([tokens, req, positions, from_ring], axis=1)
            finished = np.nonzero((positions + 1) % ratio == 0)[0]
            fill(out[f"plan_{name}"], rows[finished], -1)
            entries = positions[finished] // ratio
            places = entry_rows(config, block_table, req[finished], entries, ratio)
            fill(out[f"plan_dst_{name}"], places, -1)
            fill(out[f"wplan_{name}"], rows[positions >= ctx[req] - pooled], -1)
        lengths = (positions + 1) // config.hca_ratio
        begins = out["hca_indptr"][:t]
        total = int(out["hca_indptr"][t])
        token = np.repeat(tokens, lengths)
        entries = np.arange(total, dtype=np.int32) - np.repeat(begins, lengths)
        rows = entry_rows(config, block_table, req[token], entries, config.hca_ratio)
        out["hca_idx"][:total] = rows


def entry_rows(
    config: V4PrepareConfig, block_table: Array, rows: Array, entries: Array, ratio: int
) -> Array:
    """Row in the pool of each compressed entry, int32 [n], of its row of the block table."""
    each = config.block_size // ratio
    if each == 1:
        return block_table[rows, entries] + np.int32(config.comp_base)
    blocks = block_table[rows, entries // each]
    return blocks * np.int32(each) + entries % each + np.int32(config.comp_base)


def compressed_rows(config: V4PrepareConfig, blocks: Array, count: int, ratio: int) -> Array:
    """Rows in the pool of the first `count` entries of one row of the block table."""
    each = config.block_size // ratio
    if each == 1:
        return blocks[:count] + np.int32(config.comp_base)
    entries = np.arange(count, dtype=np.int32)
    return blocks[entries // each] * np.int32(each) + entries % each + np.int32(config.comp_base)


def offsets(out: Array, lengths: Array) -> int:
    """Prefix sums of `lengths` into `out`, the last one repeated to its end; returns the last."""
    count = len(lengths)
    out[0] = 0
    np.cumsum(lengths, out=out[1 : count + 1])
    total = int(out[count])
    out[count + 1 :] = total
    return total


def fill(out: Array, values: Any, pad: int) -> None:
    """Write `values` to the start of `out` and `pad` to the rest."""
    count = len(values)
    if count:
        out[:count] = values
    if count < len(out):
        out[count:] = pad
