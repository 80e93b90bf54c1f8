"""What the layers do with the index arrays of one step, on tagged memory, and what must hold.

The order inside a layer is that of a decode step: write the window, compress, attend. Rows of a
prompt longer than a decode step attend first and write the ring afterwards. The compressor reads
its state ring before or after the decode rows have stored theirs: both orders must work.

A consumer takes the arrays as they are: it visits every row of a plan up to its capacity and
skips pads. Nothing here computes an index that a builder should have computed, but for the rows
of the entries that the indexer scans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.v4_prepare.simulator_memory import (
    ENTRY_KIND,
    HOLLOW,
    Compressor,
    Memory,
    Violation,
    compressors,
    describe,
    first_compressed_row,
    kind_of_wrong_read,
)
from tests.v4_prepare.simulator_requests import Step

NUM_SCANNED = 48
"""Most entries of ratio 1 that the indexer looks at for a token; drawn at random above this."""


class Outputs:
    """The arrays of one step by name, from a dictionary or from attributes, as NumPy arrays."""

    def __init__(self, result: Any) -> None:
        self._get = result.__getitem__ if isinstance(result, dict) else result.__getattribute__

    def __getattr__(self, name: str) -> Any:
        value = self._get(name)
        array = None if value is None else np.asarray(value)
        setattr(self, name, array)
        return array


def expect(right: Any, kind: str, part: str, text: str, *values: Any) -> None:
    """Raise a violation unless all of `right` is true; `text` is formatted with the values."""
    if not np.all(right):
        raise Violation(kind, part, text.format(*values))


def run_layers(
    memory: Memory,
    step: Step,
    out: Outputs,
    rng: np.random.Generator,
    translate: Callable[[np.ndarray, np.ndarray], Any] | None = None,
) -> None:
    """One step on one layer of each kind; raises Violation at the first wrong read or write.

    `translate` makes rows of the entries that an indexer chose: `(block_table, local_topk)` ->
    rows in the order of `csa_indptr`. Without it only what the indexer scans is looked at.
    """
    cfg = memory.cfg
    _check_layout(step, out)
    _check_padding(step, out)
    early = ~step.is_prefill
    if cfg.swa == "paged" and rng.integers(2):
        # pages have room for all keys of a step, so prompts may write theirs at once
        early = np.ones_like(early)
    _check_window_writers(memory, step, out)
    _write_window(memory, step, out, early)
    for c in compressors(cfg):
        states_first = bool(rng.integers(2))
        if states_first:
            _store_states(memory, step, out, c, ~step.is_prefill)
        _compress(memory, step, out, c)
        _store_states(memory, step, out, c, step.is_prefill | (not states_first))
    _attend_window(memory, step, out)
    _attend_entries(memory, step, out)
    _scan_entries(memory, step, out, rng)
    if translate is not None:
        _attend_chosen(memory, step, out, rng, translate)
    _write_window(memory, step, out, ~early)


def _check_layout(step: Step, out: Outputs) -> None:
    """Which tokens there are, and the host-known counts."""
    n, rows = step.num_tokens, len(step.ctx)
    expect(out.positions[:n] == step.position, "wrong value", "layout", "positions")
    expect(out.req_of_token[:n] == step.row, "wrong value", "layout", "req_of_token")
    expect(out.cu_q[: rows + 1] == step.cu_q, "wrong value", "layout", "cu_q")
    expect(out.ctx[:rows] == step.ctx, "wrong value", "layout", "ctx")
    plans = [out.plan_r1, out.wplan_r1, out.plan_r2, out.wplan_r2]
    counts = [rows, n, out.hca_indptr[n], out.csa_indptr[n], *((p[:, 0] >= 0).sum() for p in plans)]
    expect(out.counts == counts, "wrong value", "layout", "counts {}, found {}", out.counts, counts)


def _check_padding(step: Step, out: Outputs) -> None:
    """A replayed graph visits the tokens and rows beyond those of the step, too."""
    n, rows = step.num_tokens, len(step.ctx)
    pads = {"req_of_token": -1, "swa_write": -1, "win_idx": -1, "win_len": 0, "ext_len": 0}
    pads |= {"csa_visible": 0, "positions": 0}
    for name, pad in pads.items():
        expect(getattr(out, name)[n:] == pad, "padding", "layout", name)
    for name in ("hca_indptr", "csa_indptr"):
        sums = getattr(out, name)
        expect(sums[0] == 0 and (sums[n:] == sums[n]).all(), "padding", "layout", name)
    expect(out.cu_q[rows:] == n, "padding", "layout", "cu_q")
    expect(out.ctx[rows:] == 0, "padding", "layout", "ctx")


def _check_reads(
    part: str,
    step: Step,
    wrong: np.ndarray,
    token: np.ndarray,
    read: np.ndarray,
    wanted: np.ndarray,
) -> None:
    """Raise for the first read that is `wrong`; all arrays have the shape of `wrong`."""
    if not wrong.any():
        return
    i = np.unravel_index(wrong.argmax(), wrong.shape)
    t, found, right = int(token[i]), int(read[i]), int(wanted[i])
    where = f"token {t} (row {step.row[t]}, position {step.position[t]})"
    text = f"{where} reads {describe(found)} instead of {describe(right)}"
    raise Violation(kind_of_wrong_read(found, right), part, text)


def _check_number(part: str, found: np.ndarray, wanted: np.ndarray, name: str) -> None:
    """How many keys the list of each token has."""
    for kind, wrong in (("missing key", found < wanted), ("extra key", found > wanted)):
        t = int(wrong.argmax()) if wrong.any() else 0
        expect(
            ~wrong,
            kind,
            part,
            "{} of token {}: {}, not {}",
            name,
            t,
            found[t : t + 1],
            wanted[t:][:1],
        )


def _check_window_writers(memory: Memory, step: Step, out: Outputs) -> None:
    """No two tokens write one row, and each writes only into memory of its own request."""
    rows = out.swa_write[: step.num_tokens]
    kept = rows >= 0
    rows = rows[kept]
    expect(rows < len(memory.window), "out of the pool", "window", "swa_write up to {}", rows)
    expect(len(np.unique(rows)) == len(rows), "two writers", "window", "swa_write {}", rows)
    mine = memory.window_writers(rows) == step.handle[kept]
    expect(mine, "foreign write", "window", "swa_write {}", rows[~mine])


def _write_window(memory: Memory, step: Step, out: Outputs, tokens: np.ndarray) -> None:
    """Store the keys of some tokens, given as a mask."""
    chosen = tokens & (out.swa_write[: step.num_tokens] >= 0)
    memory.window[out.swa_write[: step.num_tokens][chosen]] = step.tag[chosen]


def _attend_window(memory: Memory, step: Step, out: Outputs) -> None:
    """Every token reads the last W positions, its own included, from the pool or from the step."""
    n, width = step.num_tokens, memory.cfg.window_size
    length, own, rows = out.win_len[:n], out.ext_len[:n], out.win_idx[:n]
    wanted_length = np.minimum(step.position + 1, width)
    _check_number("window", length + own, wanted_length, "win_len + ext_len")
    column = np.arange(width)
    in_pool = column < length[:, None]
    expect((rows >= 0) == in_pool, "padding", "window", "win_idx is not packed to the left")
    expect(rows < len(memory.window), "out of the pool", "window", "win_idx {}", rows)
    token = np.broadcast_to(np.arange(n)[:, None], (n, width))
    source = token + 1 - own[:, None] + column - length[:, None]
    used = column < wanted_length[:, None]
    from_step = used & ~in_pool
    expect((source >= 0)[from_step], "out of the step", "window", "ext_len reaches before token 0")
    read = np.where(in_pool, memory.window[rows], step.tag[np.where(from_step, source, 0)])
    first = np.maximum(step.position - width + 1, 0)[:, None]
    x = np.minimum(first + column, step.position[:, None])
    wanted = step.contents[step.handle[:, None], x]
    # a step run again only to fill the ring has no keys before its first token
    wrong = used & (read != wanted) & (x >= step.missing_below[:, None])
    _check_reads("window", step, wrong, token, read, wanted)


def _attend_entries(memory: Memory, step: Step, out: Outputs) -> None:
    """Every token reads all entries of ratio 2 whose tokens are at or before it."""
    cfg, n = memory.cfg, step.num_tokens
    sums = out.hca_indptr[: n + 1]
    numbers = (step.position + 1) // cfg.hca_ratio
    _check_number("r2", np.diff(sums), numbers, "hca_indptr")
    token = np.repeat(np.arange(n), numbers)
    entry = np.arange(len(token)) - sums[token]
    if out.hca_idx is None:
        rows = _row_of_entry(cfg, step, token, entry, cfg.hca_ratio)
    else:
        rows = out.hca_idx[: len(token)]
    last = (entry + 1) * cfg.hca_ratio - 1
    wanted = step.contents[step.handle[token], last] + ENTRY_KIND["r2"]
    read = _read_entries(memory, rows, "r2")
    _check_reads("r2", step, read != wanted, token, read, wanted)


def _scan_entries(memory: Memory, step: Step, out: Outputs, rng: np.random.Generator) -> None:
    """The indexer of every token scans the visible entries of ratio 1, or a sample of them."""
    cfg, n = memory.cfg, step.num_tokens
    numbers = (step.position + 1) // cfg.csa_ratio
    _check_number("r1", out.csa_visible[:n], numbers, "csa_visible")
    chosen = np.minimum(numbers, cfg.index_topk)
    _check_number("r1", np.diff(out.csa_indptr[: n + 1]), chosen, "csa_indptr")
    if not numbers.any():
        return
    most = int(numbers.max())
    entry = np.broadcast_to(np.arange(min(most, NUM_SCANNED)), (n, min(most, NUM_SCANNED)))
    if most > NUM_SCANNED:
        # the newest entries and as many anywhere
        half = NUM_SCANNED // 2
        newest = numbers[:, None] - 1 - np.arange(half)
        anywhere = (rng.random((n, half)) * numbers[:, None]).astype(np.int64)
        entry = np.maximum(np.concatenate([newest, anywhere], axis=1), 0)
    token = np.broadcast_to(np.arange(n)[:, None], entry.shape)
    seen = entry < numbers[:, None]
    token, entry = token[seen], entry[seen]
    rows = _row_of_entry(cfg, step, token, entry, cfg.csa_ratio)
    _check_csa(memory, step, token, entry, rows)


def _attend_chosen(
    memory: Memory,
    step: Step,
    out: Outputs,
    rng: np.random.Generator,
    translate: Callable[[np.ndarray, np.ndarray], Any],
) -> None:
    """Every token reads the entries of ratio 1 that were chosen for it, through translated rows."""
    cfg, n = memory.cfg, step.num_tokens
    numbers = (step.position + 1) // cfg.csa_ratio
    offset = (rng.random(n) * numbers).astype(np.int64)[:, None]
    column = np.arange(cfg.index_topk)
    local = (offset + column) % np.maximum(numbers, 1)[:, None]
    chosen = column < numbers[:, None]
    # what comes after the choice of a token must not matter
    local[~chosen] = rng.integers(-1, 9)
    rows = np.asarray(translate(step.table, local))
    expect(len(rows) == chosen.sum(), "missing key", "r1", "{} translated rows", len(rows))
    token = np.broadcast_to(np.arange(n)[:, None], local.shape)[chosen]
    _check_csa(memory, step, token, local[chosen], rows)


def _check_csa(
    memory: Memory, step: Step, token: np.ndarray, entry: np.ndarray, rows: np.ndarray
) -> None:
    """The rows hold these entries of ratio 1."""
    cfg = memory.cfg
    last = (entry + 1) * cfg.csa_ratio - 1
    wanted = step.contents[step.handle[token], last] + ENTRY_KIND["r1"]
    first, missing = last + 1 - 2 * cfg.csa_ratio, step.missing_below[token]
    wanted[(np.maximum(first, 0) < missing) & (missing <= last)] = HOLLOW
    read = _read_entries(memory, rows, "r1")
    _check_reads("r1", step, read != wanted, token, read, wanted)


def _row_of_entry(
    cfg: Any, step: Step, token: np.ndarray, entry: np.ndarray, ratio: int
) -> np.ndarray:
    """Row of the pool of an entry of a token's request, through the block table."""
    per_block = cfg.block_size // ratio
    blocks = step.table[step.row[token], entry // per_block]
    return first_compressed_row(cfg) + blocks * per_block + entry % per_block


def _read_entries(memory: Memory, rows: np.ndarray, name: str) -> np.ndarray:
    """Tags of compressed rows."""
    pool = memory.entries[name]
    rows = rows - first_compressed_row(memory.cfg)
    expect((rows >= 0) & (rows < len(pool)), "out of the pool", name, "rows {}", rows)
    return pool[rows]


def _plan(step: Step, plan: np.ndarray, part: str, name: str) -> np.ndarray:
    """Token, position and ring sources [3, n] of the rows of a plan that a consumer visits."""
    live = plan[:, 0] >= 0
    expect((plan[~live] == -1).all(), "padding", part, "{} holds half a pad", name)
    token, row, position, from_ring = plan[live].T
    known = token < step.num_tokens
    expect(
        known, "stale plan", part, "{} has tokens {} of {}", name, token[~known], step.num_tokens
    )
    right = (step.row[token] == row) & (step.position[token] == position)
    expect(right, "stale plan", part, "{} has rows of no token: {}", name, plan[live][~right][:3])
    return np.stack([token, position, from_ring])


def _compress(memory: Memory, step: Step, out: Outputs, c: Compressor) -> None:
    """Pool the sources of each finished entry and write it, each entry once."""
    cfg = memory.cfg
    plan, rows = getattr(out, f"plan_{c.name}"), getattr(out, f"plan_dst_{c.name}")
    expect((rows < 0) == (plan[:, 0] < 0), "padding", c.name, "plan_dst_{}: {}", c.name, rows)
    token, position, from_ring = _plan(step, plan, c.name, f"plan_{c.name}")
    finished = np.flatnonzero((step.position + 1) % c.ratio == 0)
    visits = np.bincount(token, minlength=step.num_tokens)
    expect(visits <= 1, "entry twice", c.name, "tokens {}", np.flatnonzero(visits > 1))
    absent = np.setdiff1d(finished, token)
    expect(not len(absent), "entry missing", c.name, "finished by tokens {}", absent)
    expect(np.array_equal(token, finished), "stale plan", c.name, "tokens {}", token)

    x = position[:, None] - c.num_sources + 1 + np.arange(c.num_sources)
    in_ring = np.arange(c.num_sources) < from_ring[:, None]
    ring = memory.states[c.name]
    stored = ring[step.slot[step.row[token]][:, None], x % ring.shape[1]]
    source = token[:, None] - (position[:, None] - x)
    exists = x >= 0
    inside = (source >= 0)[exists & ~in_ring]
    expect(inside, "out of the step", c.name, "w = {} reaches before token 0", from_ring)
    read = np.where(in_ring, stored, step.tag[np.maximum(source, 0)])
    wanted = step.contents[step.handle[token][:, None], np.maximum(x, 0)]
    missing = x < step.missing_below[token][:, None]
    wrong = exists & (read != wanted) & ~missing
    tokens = np.broadcast_to(token[:, None], x.shape)
    _check_reads(f"sources of {c.name}", step, wrong, tokens, read, wanted)

    per_block = cfg.block_size // c.ratio
    rows = rows[rows >= 0] - first_compressed_row(cfg)
    expect((rows >= 0) & (rows < len(memory.entries[c.name])), "out of the pool", c.name, "dst")
    expect(len(np.unique(rows)) == len(rows), "two writers", c.name, "plan_dst {}", rows)
    mine = memory.block_writer[rows // per_block] == step.handle[token]
    expect(mine, "foreign write", c.name, "plan_dst {}", rows[~mine])
    entry = step.tag[token] + ENTRY_KIND[c.name]
    memory.entries[c.name][rows] = np.where((exists & missing).any(axis=1), HOLLOW, entry)


def _store_states(
    memory: Memory, step: Step, out: Outputs, c: Compressor, tokens: np.ndarray
) -> None:
    """Keep the sources of the write plan in the state rings, for some tokens given as a mask."""
    name = f"wplan_{c.name}"
    token, position, _ = _plan(step, getattr(out, name), c.name, name)
    ring = memory.states[c.name]
    slot = step.slot[step.row[token]]
    rows = slot * ring.shape[1] + position % ring.shape[1]
    expect(len(np.unique(rows)) == len(rows), "two writers", c.name, "{} rows {}", name, rows)
    chosen = tokens[token]
    ring.reshape(-1)[rows[chosen]] = step.tag[token[chosen]]
