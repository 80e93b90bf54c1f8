"""Reads and writes of the layers by the index arrays of one step, on tagged memory.

The order inside a layer is that of a decode step: write the window, compress, attend. Rows of a
prompt longer than a decode step attend first and write the ring afterwards. The compressor reads
its state ring before or after the decode rows have stored theirs: both orders must work.

A consumer takes the arrays as they are: it visits every row of a plan up to its capacity and
skips pads. Nothing here computes an index that a builder should have computed, but for the rows
of the entries that the indexer scans.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.v4_prepare.simulator import Step

NEVER, FREED, HOLLOW = -1, -2, -3
"""Tags of rows that no one wrote, that were freed, and of entries pooled from missing sources."""
ENTRY_BIT = {"r1": 1 << 60, "r2": 2 << 60}
# name of an output -> what it holds past the tokens of a step
_PADS = {"req_of_token": -1, "swa_write": -1, "win_idx": -1, "win_len": 0, "ext_len": 0}
_PADS |= {"csa_visible": 0, "positions": 0}
Translate = Callable[[np.ndarray, np.ndarray], Any]


class Violation(AssertionError):
    """A step whose arrays make a layer read or write what it must not.

    Attributes:
        part: which list it was found in: "window", "r1", "r2", "sources of r1", "layout", ...
    """

    def __init__(self, part: str, text: str) -> None:
        self.part = part
        super().__init__(f"{part}: {text}")


def compressors(cfg: Any) -> list[tuple[str, int, int]]:
    """Name, ratio and pooled tokens of the overlapping compressor (CSA) and the plain one (HCA)."""
    return [("r1", cfg.csa_ratio, 2 * cfg.csa_ratio), ("r2", cfg.hca_ratio, cfg.hca_ratio)]


class Memory:
    """The caches of one layer of each kind, as tags, and who may write where.

    Attributes:
        window: int64 [rows] of the ring or the pages.
        entries: int64 [blocks * (P / ratio)] of each compressor, without `comp_base`.
        states: int64 [slots, pool + drafts] of each compressor: sources that are not pooled yet.
        comp_base: row of the pool where compressed rows start.
        slot_owner: which request (its `handle`) owns a slot, -1 for none.
        block_writer: the only request that may write into a block, -1 for none.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        # rows of a slot's ring, or of a page
        is_ring = cfg.swa == "ring"
        self.owned = cfg.window_size + cfg.spec_tokens if is_ring else cfg.block_size
        num_rows = self.owned * (cfg.num_slots if is_ring else cfg.num_blocks)
        self.window = np.full(num_rows, NEVER, np.int64)
        self.comp_base = num_rows if cfg.comp_base is None else cfg.comp_base
        self.entries, self.states = {}, {}
        for name, ratio, pooled in compressors(cfg):
            self.entries[name] = np.full(cfg.num_blocks * cfg.block_size // ratio, NEVER, np.int64)
            self.states[name] = np.full((cfg.num_slots, pooled + cfg.spec_tokens), NEVER, np.int64)
        self.slot_owner = np.full(cfg.num_slots, -1, np.int64)
        self.block_writer = np.full(cfg.num_blocks, -1, np.int64)

    def free_slot(self, slot: int) -> None:
        """Poison the rings of a slot."""
        self.slot_owner[slot] = -1
        if self.cfg.swa == "ring":
            self.window[slot * self.owned : (slot + 1) * self.owned] = FREED
        for ring in self.states.values():
            ring[slot] = FREED

    def free_block(self, block: int) -> None:
        """Poison what a block holds."""
        self.block_writer[block] = -1
        pools = [*self.entries.values(), *([self.window] if self.cfg.swa == "paged" else [])]
        for pool in pools:
            per_block = len(pool) // self.cfg.num_blocks
            pool[block * per_block : (block + 1) * per_block] = FREED

    def window_writers(self, rows: np.ndarray) -> np.ndarray:
        """Return the request that may write each window row."""
        writers = self.slot_owner if self.cfg.swa == "ring" else self.block_writer
        return writers[rows // self.owned]

    def install_states(self, tokens: np.ndarray, slot: int) -> None:
        """Fill the state rings of a slot with the sources that entries to come still pool."""
        n = len(tokens)
        for name, ratio, pooled in compressors(self.cfg):
            x = np.arange(max(0, (n // ratio + 1) * ratio - pooled), n)
            ring = self.states[name][slot]
            ring[x % len(ring)] = tokens[x]


def expect(right: Any, part: str, text: str, *values: Any) -> None:
    """Raise a violation unless all of `right` is true; `text` is formatted with the values."""
    if not np.all(right):
        raise Violation(part, text.format(*values))


def run_layers(
    memory: Memory,
    step: Step,
    result: Any,
    rng: np.random.Generator,
    translate: Translate | None = None,
) -> None:
    """One step on one layer of each kind; raises Violation at the first wrong read or write.

    Args:
        result: the arrays of the step, a dictionary or an object.
        translate: makes rows of the entries that an indexer chose: `(block_table, local_topk)` ->
            rows in the order of `csa_indptr`. None = only what the indexer scans is looked at.
    """
    if not isinstance(result, dict):
        result = vars(result)
    out = SimpleNamespace(**{"hca_idx": None} | result)
    cfg, early = memory.cfg, ~step.is_prefill
    _check_layout(step, out)
    if cfg.swa == "paged" and rng.integers(2):
        # pages have room for all keys of a step, so prompts may write theirs at once
        early = np.ones_like(early)
    _check_window_writers(memory, step, out)
    _write_window(memory, step, out, early)
    for name, ratio, pooled in compressors(cfg):
        states_first = bool(rng.integers(2))
        if states_first:
            _store_states(memory, step, out, name, ~step.is_prefill)
        _compress(memory, step, out, name, ratio, pooled)
        _store_states(memory, step, out, name, step.is_prefill | (not states_first))
    _attend_window(memory, step, out)
    _attend_entries(memory, step, out)
    _attend_chosen(memory, step, out, rng, translate)
    _write_window(memory, step, out, ~early)


def _check_layout(step: Step, out: Any) -> None:
    """Tokens, host-known counts, and padding: a replayed graph visits tokens and rows past them."""
    n, rows = step.num_tokens, len(step.ctx)
    expect(out.positions[:n] == step.position, "layout", "positions")
    expect(out.req_of_token[:n] == step.row, "layout", "req_of_token")
    expect(out.cu_q[: rows + 1] == step.cu_q, "layout", "cu_q")
    expect(out.ctx[:rows] == step.ctx, "layout", "ctx")
    plans = [out.plan_r1, out.wplan_r1, out.plan_r2, out.wplan_r2]
    counts = [rows, n, out.hca_indptr[n], out.csa_indptr[n], *((p[:, 0] >= 0).sum() for p in plans)]
    expect(out.counts == counts, "layout", "counts {}, not {}", out.counts, counts)
    for name, pad in _PADS.items():
        expect(getattr(out, name)[n:] == pad, "layout", "padding of {}", name)
    for sums in (out.hca_indptr, out.csa_indptr):
        expect(sums[0] == 0 and (sums[n:] == sums[n]).all(), "layout", "padding of offsets")
    expect(out.cu_q[rows:] == n, "layout", "padding of cu_q")
    expect(out.ctx[rows:] == 0, "layout", "padding of ctx")


def _check_reads(
    part: str, step: Step, used: Any, token: np.ndarray, read: np.ndarray, wanted: np.ndarray
) -> None:
    """Raise for the first used read of another tag; all arrays have the same shape."""
    wrong = used & (read != wanted)
    if wrong.any():
        i = np.unravel_index(wrong.argmax(), wrong.shape)
        t = int(token[i])
        where = f"token {t} (row {step.row[t]}, position {step.position[t]})"
        raise Violation(part, f"{where} reads tag {read[i]} instead of {wanted[i]}")


def _check_window_writers(memory: Memory, step: Step, out: Any) -> None:
    """No two tokens write one row, and each writes only into memory of its own request."""
    rows = out.swa_write[: step.num_tokens]
    kept = rows >= 0
    rows = rows[kept]
    expect(rows < len(memory.window), "window", "swa_write past the pool: {}", rows)
    expect(len(np.unique(rows)) == len(rows), "window", "two writers of a row: {}", rows)
    mine = memory.window_writers(rows) == step.handle[kept]
    expect(mine, "window", "rows of another request are written: {}", rows[~mine])


def _write_window(memory: Memory, step: Step, out: Any, tokens: np.ndarray) -> None:
    """Store the keys of some tokens, given as a mask."""
    rows = out.swa_write[: step.num_tokens]
    chosen = tokens & (rows >= 0)
    memory.window[rows[chosen]] = step.tag[chosen]


def _attend_window(memory: Memory, step: Step, out: Any) -> None:
    """Every token reads the last W positions, its own included, from the pool or from the step."""
    n, width = step.num_tokens, memory.cfg.window_size
    length, own, rows = out.win_len[:n], out.ext_len[:n], out.win_idx[:n]
    wanted_length = np.minimum(step.position + 1, width)
    expect(length + own == wanted_length, "window", "{} + {} keys", length, own)
    column = np.arange(width)
    in_pool = column < length[:, None]
    expect((rows >= 0) == in_pool, "window", "win_idx is not packed to the left")
    expect(rows < len(memory.window), "window", "win_idx past the pool: {}", rows)
    token = np.broadcast_to(np.arange(n)[:, None], (n, width))
    source = token + 1 - own[:, None] + column - length[:, None]
    used = column < wanted_length[:, None]
    expect((source >= 0)[used & ~in_pool], "window", "ext_len reaches before token 0")
    read = np.where(in_pool, memory.window[rows], step.tag[np.where(used & ~in_pool, source, 0)])
    first = np.maximum(step.position - width + 1, 0)[:, None]
    x = np.minimum(first + column, step.position[:, None])
    # a step run again only to fill the ring has no keys before its first token
    used &= x >= step.missing_below[:, None]
    _check_reads("window", step, used, token, read, step.contents[step.handle[:, None], x])


def _attend_entries(memory: Memory, step: Step, out: Any) -> None:
    """Every token reads all entries of ratio 2 whose tokens are at or before it."""
    ratio, n = memory.cfg.hca_ratio, step.num_tokens
    sums, numbers = out.hca_indptr[: n + 1], (step.position + 1) // ratio
    expect(np.diff(sums) == numbers, "r2", "offsets {}, of {} entries", sums, numbers)
    token = np.repeat(np.arange(n), numbers)
    entry = np.arange(len(token)) - sums[token]
    if out.hca_idx is None:
        rows = _row_of_entry(memory, step, token, entry, ratio)
    else:
        rows = out.hca_idx[: len(token)]
    _check_entries(memory, step, "r2", ratio, token, entry, rows)


def _attend_chosen(
    memory: Memory, step: Step, out: Any, rng: np.random.Generator, translate: Translate | None
) -> None:
    """The indexer scans all visible entries of ratio 1; attention reads those that were chosen."""
    cfg, n = memory.cfg, step.num_tokens
    numbers = (step.position + 1) // cfg.csa_ratio
    expect(out.csa_visible[:n] == numbers, "r1", "csa_visible {}", out.csa_visible)
    chosen = np.minimum(numbers, cfg.index_topk)
    expect(np.diff(out.csa_indptr[: n + 1]) == chosen, "r1", "csa_indptr {}", out.csa_indptr)
    token = np.repeat(np.arange(n), numbers)
    entry = np.arange(len(token)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    rows = _row_of_entry(memory, step, token, entry, cfg.csa_ratio)
    _check_entries(memory, step, "r1", cfg.csa_ratio, token, entry, rows)
    if translate is None:
        return
    column, offset = np.arange(cfg.index_topk), (rng.random(n) * numbers).astype(np.int64)
    local = (offset[:, None] + column) % np.maximum(numbers, 1)[:, None]
    seen = column < numbers[:, None]
    # what comes after the choice of a token must not matter
    local[~seen] = rng.integers(-1, 9)
    rows = np.asarray(translate(step.table, local))
    expect(len(rows) == seen.sum(), "r1", "{} translated rows", len(rows))
    token = np.broadcast_to(np.arange(n)[:, None], local.shape)[seen]
    _check_entries(memory, step, "r1", cfg.csa_ratio, token, local[seen], rows)


def _row_of_entry(
    memory: Memory, step: Step, token: np.ndarray, entry: np.ndarray, ratio: int
) -> np.ndarray:
    """Row of the pool of an entry of a token's request, through the block table."""
    per_block = memory.cfg.block_size // ratio
    blocks = step.table[step.row[token], entry // per_block]
    return memory.comp_base + blocks * per_block + entry % per_block


def _check_entries(
    memory: Memory,
    step: Step,
    name: str,
    ratio: int,
    token: np.ndarray,
    entry: np.ndarray,
    rows: np.ndarray,
) -> None:
    """The rows of the pool hold these entries of the tokens' requests."""
    last = (entry + 1) * ratio - 1
    wanted = step.contents[step.handle[token], last] + ENTRY_BIT[name]
    if name == "r1":
        first, missing = last + 1 - 2 * ratio, step.missing_below[token]
        wanted[(np.maximum(first, 0) < missing) & (missing <= last)] = HOLLOW
    pool, rows = memory.entries[name], rows - memory.comp_base
    expect((rows >= 0) & (rows < len(pool)), name, "rows past the pool: {}", rows)
    _check_reads(name, step, True, token, pool[rows], wanted)


def _plan(step: Step, out: Any, part: str, kind: str) -> np.ndarray:
    """Token, position and ring sources [3, n] of the rows of a plan that a consumer visits."""
    plan = getattr(out, kind + part)
    live = plan[:, 0] >= 0
    expect(plan[~live] == -1, part, "{} holds half a pad", kind)
    token, row, position, from_ring = plan[live].T
    expect(token < step.num_tokens, part, "{} has tokens {}", kind, token)
    is_right = (step.row[token] == row) & (step.position[token] == position)
    expect(is_right, part, "{} has rows of no token: {}", kind, plan[live][~is_right][:3])
    return np.stack([token, position, from_ring])


def _compress(memory: Memory, step: Step, out: Any, name: str, ratio: int, pooled: int) -> None:
    """Pool the sources of each finished entry and write it, each entry once."""
    plan, rows = getattr(out, f"plan_{name}"), getattr(out, f"plan_dst_{name}")
    expect((rows < 0) == (plan[:, 0] < 0), name, "padding of plan_dst: {}", rows)
    token, position, from_ring = _plan(step, out, name, "plan_")
    finished = np.flatnonzero((step.position + 1) % ratio == 0)
    expect(np.array_equal(token, finished), name, "plan of {}, not {}", token, finished)

    x = position[:, None] - pooled + 1 + np.arange(pooled)
    in_ring, exists = np.arange(pooled) < from_ring[:, None], x >= 0
    ring = memory.states[name]
    stored = ring[step.slot[step.row[token]][:, None], x % ring.shape[1]]
    source = token[:, None] - (position[:, None] - x)
    expect((source >= 0)[exists & ~in_ring], name, "w = {} reaches before token 0", from_ring)
    read = np.where(in_ring, stored, step.tag[np.maximum(source, 0)])
    wanted = step.contents[step.handle[token][:, None], np.maximum(x, 0)]
    missing = x < step.missing_below[token][:, None]
    tokens = np.broadcast_to(token[:, None], x.shape)
    _check_reads(f"sources of {name}", step, exists & ~missing, tokens, read, wanted)

    pool, rows = memory.entries[name], rows[rows >= 0] - memory.comp_base
    expect((rows >= 0) & (rows < len(pool)), name, "plan_dst past the pool: {}", rows)
    expect(len(np.unique(rows)) == len(rows), name, "two writers of a row: {}", rows)
    mine = memory.block_writer[rows // (memory.cfg.block_size // ratio)] == step.handle[token]
    expect(mine, name, "rows of another request are written: {}", rows[~mine])
    is_hollow = (exists & missing).any(axis=1)
    pool[rows] = np.where(is_hollow, HOLLOW, step.tag[token] + ENTRY_BIT[name])


def _store_states(memory: Memory, step: Step, out: Any, name: str, tokens: np.ndarray) -> None:
    """Keep the sources of the write plan in the state rings, for some tokens given as a mask."""
    token, position, _ = _plan(step, out, name, "wplan_")
    ring = memory.states[name]
    rows = step.slot[step.row[token]] * ring.shape[1] + position % ring.shape[1]
    expect(len(np.unique(rows)) == len(rows), name, "two writers of a state: {}", rows)
    chosen = tokens[token]
    ring.reshape(-1)[rows[chosen]] = step.tag[token[chosen]]
