"""The way of ROCm/ATOM #728 to prepare a V4 decode step: NumPy on the host, over all tokens.

It fills all arrays of `fd_dsa.v4_prepare` for decode rows with window rings, except `ext_len`,
which is zero there. The code is ours: the window by broadcasting, lists by repeat, cumulative sums
and a gather, plans by a mask over the tokens. Two rules of the original give wrong rows with
drafts, and are replaced at no cost. Its window belongs to a request's first token, here to each
token. Its count of compressed entries is that of the request's last token, here each token's own.
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

    def used(self, group: str) -> int:
        """Return the number of a group's values that a copy must move."""
        return int(self.arrays["counts"][2]) if group == "entries" else self.groups[group].size


class Vectorised:
    """The vectorised form. `first` leaves the plans and the entries to `second`.

    In between, copies of what `first` made may begin, which is how the original overlaps them
    with work of the host.

    Args:
        config: sizes of the steps, with window rings.
        out: arrays that are written.
    """

    def __init__(self, config: V4PrepareConfig, out: HostArrays) -> None:
        self._config, self._out = config, out.arrays
        self._arange = np.arange(config.window_size, dtype=np.int32)
        self._req = self._positions = np.empty(0, np.int32)

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
    """Return row in the pool of each compressed entry, int32 [n], of its row of the block table."""
    each = config.block_size // ratio
    if each == 1:
        return block_table[rows, entries] + np.int32(config.comp_base)
    blocks = block_table[rows, entries // each]
    return blocks * np.int32(each) + entries % each + np.int32(config.comp_base)


def offsets(out: Array, lengths: Array) -> int:
    """Write prefix sums of `lengths` to `out`, whose rest repeats the last. Returns the last."""
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
