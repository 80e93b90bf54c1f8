"""The host builder: all outputs of a step in NumPy, written to reusable arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.host_tensor import Int32Array
from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.tensor import Array, StepArray
from fd_dsa.v4_prepare.checks import Integers, check_step, step_inputs
from fd_dsa.v4_prepare.config import OUTPUT_SHAPES, V4PrepareConfig

# for this many tokens or fewer, copying each list costs less than finding the runs
_FEW_TOKENS = 16
# mean run length in entries from which copying each run costs less than gathering entries
_GATHERED_ENTRIES = 192


class V4Arrays:
    """All outputs of a step, int32, at full capacity. t = token, b = row.

    Args:
        cfg: sizes of the steps. Tcap tokens, Bcap rows, W, topk, r1, r2 are its fields.
        allocate: makes an array or tensor of a shape and dtype. None = NumPy arrays of zeros.

    Attributes:
        config: the sizes.
        positions: [Tcap], position of t, pad 0.
        req_of_token: [Tcap], row b of t, pad -1.
        cu_q: [Bcap + 1], prefix sums of q, pad T.
        ctx: [Bcap], tokens of b after the step, also of idle rows, pad 0.
        win_idx: [Tcap, W], pool rows of the window keys that t reads, ascending, pad -1.
        win_len: [Tcap], number of those rows, pad 0.
        ext_len: [Tcap], number of further window keys that t reads from the step's own keys, the
            rows up to t, pad 0.
        swa_write: [Tcap], pool row for the key of t. -1 = not stored, because a ring keeps the last
            W keys.
        hca_indptr: [Tcap + 1], offset of the HCA entries of t in `hca_idx`, pad = the last offset.
        hca_idx: [Tcap * (Lmax // r2)], rows of entries 0..(p + 1) // r2 - 1 of each token,
            undefined after the total. None in table mode.
        csa_visible: [Tcap], (p + 1) // r1, number of CSA entries visible to t, pad 0.
        csa_indptr: [Tcap + 1], prefix sums of min(csa_visible, topk), pad = the last offset.
        plan_r1, plan_r2: [cap_p, 4], one row for each entry that the step finishes, in token order:
            (t, b, p, number of sources from the state ring), pad -1.
        plan_dst_r1, plan_dst_r2: [cap_p], pool row of that entry, pad -1.
        wplan_r1, wplan_r2: [cap_w, 4], the same columns for the last K(r) tokens of each row, pad
            -1. They are stored in row slot * (K(r) + k) + p % (K(r) + k) of the state ring.
        counts: [8], B, T, entries of hca_idx, of csa_indptr, rows of plan_r1, wplan_r1, plan_r2,
            wplan_r2.
        block_table: [Bcap, MB], the table of a staged step. Cells that no step needed yet are
            undefined. `v4_prepare_np` does not write it.
    """

    positions: StepArray
    req_of_token: StepArray
    cu_q: StepArray
    ctx: StepArray
    win_idx: StepArray
    win_len: StepArray
    ext_len: StepArray
    swa_write: StepArray
    hca_indptr: StepArray
    hca_idx: StepArray | None = None
    csa_visible: StepArray
    csa_indptr: StepArray
    plan_r1: StepArray
    plan_r2: StepArray
    plan_dst_r1: StepArray
    plan_dst_r2: StepArray
    wplan_r1: StepArray
    wplan_r2: StepArray
    counts: StepArray
    block_table: StepArray

    def __init__(self, cfg: V4PrepareConfig, allocate: Allocate | None = None) -> None:
        self.config = cfg
        shapes = OUTPUT_SHAPES(cfg) | {"block_table": (cfg.max_num_seqs, cfg.max_blocks_per_seq)}
        for name, shape in shapes.items():
            setattr(self, name, (allocate or np.zeros)(shape, "int32"))


class _Step(NamedTuple):
    """A step: its rows, int32 [B], with their block table, and its tokens, int32 [T].

    `number` is the index of a token within its row of this step.
    """

    ctx: Int32Array
    q: Int32Array
    slot: Int32Array
    block_table: npt.NDArray[Any]
    row: Int32Array
    position: Int32Array
    number: Int32Array


def v4_prepare_np(
    cfg: V4PrepareConfig,
    ctx: npt.ArrayLike,
    q: npt.ArrayLike,
    slot: npt.ArrayLike,
    block_table: npt.ArrayLike,
    out: V4Arrays | None = None,
) -> V4Arrays:
    """Compute all outputs of one step on the host.

    Token j of row b is at position p = ctx[b] - q[b] + j. It reads the window keys p-W+1..p, and
    entry e of ratio r if e < (p + 1) // r. Counts are per token, because tokens of one row may be
    on both sides of the end of an entry.

    Args:
        cfg: sizes of the step.
        ctx: [B], any integer dtype or a list, tokens of each row after the step.
        q: [B], tokens of each row in the step, 0 = idle row.
        slot: [B], owner of the row's rings. Active rows have distinct slots, those of idle rows are
            ignored.
        block_table: [B, columns]. The first ceil(ctx / block_size) cells of an active row are its
            blocks. Other cells are ignored.
        out: arrays to fill, with any contents. None = new arrays.

    Returns:
        `out`, or the new arrays, with padding.

    Raises:
        V4PrepareError: an input breaks a rule. `.code` names the rule, `.row` the row. The outputs
            are unchanged.
        ValueError: `out` belongs to another configuration.

    Cost: a fixed number of NumPy calls, and for long HCA lists one copy for each row and for each
    entry that it finishes. Temporary memory is proportional to the window cells of the step and its
    part of the block table.
    Source: the idea is ROCm/ATOM #728.
    """
    ctx, q, slot, table = step_inputs(cfg, ctx, q, slot, block_table)
    num_tokens = check_step(cfg, ctx, q, slot, table)
    if out is None:
        out = V4Arrays(cfg)
    elif out.config != cfg:
        raise ValueError(
            f"out: got arrays of {out.config}, must be of {cfg}; allocate them with V4Arrays(cfg)"
        )
    # the slot of an idle row may be any number, because it is never used
    ctx, q, slot = (array.astype(np.int32, copy=False) for array in (ctx, q, slot))
    step = step_of(ctx, q, slot, table)
    position, row = step.position, step.row
    out.cu_q[0] = 0
    _fill(out.cu_q[1:], np.cumsum(q, dtype=np.int32), num_tokens)
    _fill(out.ctx, ctx, 0)
    _fill(out.positions, position, 0)
    _fill(out.req_of_token, row, -1)
    _write_window(cfg, step, out)
    num_hca = _write_offsets((position + 1) // cfg.hca_ratio, out.hca_indptr)
    if out.hca_idx is not None:
        write_hca_list(cfg, step, out.hca_indptr, out.hca_idx)
    visible = (position + 1) // cfg.csa_ratio
    _fill(out.csa_visible, visible, 0)
    num_csa = _write_offsets(np.minimum(visible, cfg.index_topk), out.csa_indptr)
    counts = [len(q), num_tokens, num_hca, num_csa]
    counts += _write_plans(cfg, step, cfg.csa_ratio, out.plan_r1, out.plan_dst_r1, out.wplan_r1)
    counts += _write_plans(cfg, step, cfg.hca_ratio, out.plan_r2, out.plan_dst_r2, out.wplan_r2)
    out.counts[:] = counts
    return out


def step_of(ctx: Int32Array, q: Int32Array, slot: Int32Array, block_table: Integers) -> _Step:
    """Return a checked step with its tokens."""
    row = np.arange(len(q), dtype=np.int32).repeat(q)
    begins = np.cumsum(q, dtype=np.int32) - q
    number = np.arange(len(row), dtype=np.int32) - begins[row]
    return _Step(ctx, q, slot, block_table, row, (ctx - q)[row] + number, number)


def _fill(array: Int32Array, values: Int32Array, pad: int) -> None:
    """Write values to the front of an array, and padding after them."""
    array[: len(values)] = values
    array[len(values) :] = pad


def _write_window(cfg: V4PrepareConfig, step: _Step, out: V4Arrays) -> None:
    """Write the window of every token, ascending and left-packed, and its own key's row.

    A token of a decode row reads its whole window from the pool. A token of a prefill row reads
    only older tokens' keys from the pool (`win_len`). It reads the rest, including its own key,
    from the step's keys (`ext_len`). Written to a ring before they are read, the step's keys would
    overwrite the window. For the same reason a ring stores only the row's last W keys.
    """
    num_tokens, width = len(step.row), cfg.window_size
    position, row = step.position, step.row
    in_prefill = (step.q > cfg.spec_tokens + 1)[row]
    oldest = np.maximum(position - (width - 1), 0)
    from_step = np.minimum(step.number + 1, width) * in_prefill
    lengths = position + 1 - oldest - from_step
    _fill(out.win_len, lengths, 0)
    _fill(out.ext_len, from_step, 0)
    columns = np.arange(width, dtype=np.int32)
    window, written = out.win_idx[:num_tokens], out.swa_write[:num_tokens]
    if cfg.swa == "ring":
        first_row = (step.slot * cfg.ring_rows)[row]
        np.add((oldest % cfg.ring_rows)[:, None], columns, out=window)
        # a window wraps at most once, so x mod R is the smaller of x and x - R, read as unsigned
        unsigned = window.view(np.uint32)
        np.minimum(unsigned, unsigned - np.uint32(cfg.ring_rows), out=unsigned)
        window += first_row[:, None]
        np.add(position % cfg.ring_rows, first_row, out=written)
        lost = in_prefill & (position < (step.ctx - width)[row])
        np.copyto(written, -1, where=lost)
    else:
        # the table may have no cell after the token itself, and those columns become -1 below
        positions = np.minimum(oldest[:, None] + columns, position[:, None])
        window[:] = _pool_rows(step.block_table, row[:, None], positions, cfg.block_size)
        written[:] = _pool_rows(step.block_table, row, position, cfg.block_size)
    np.copyto(window, -1, where=columns >= lengths[:, None])
    out.win_idx[num_tokens:] = -1
    out.swa_write[num_tokens:] = -1


def _pool_rows(
    block_table: Integers, row: Int32Array, number: Int32Array, per_block: int
) -> Int32Array:
    """Return the pool rows of each row's items `number`, `per_block` items a block."""
    blocks = block_table[row, number // per_block].astype(np.int32, copy=False)
    return blocks * np.int32(per_block) + number % per_block


def _write_offsets(counts: Int32Array, indptr: Int32Array) -> int:
    """Write the prefix sums of the tokens' list lengths, padded with the last one.

    Returns:
        The last prefix sum.
    """
    indptr[0] = 0
    np.cumsum(counts, out=indptr[1 : len(counts) + 1])
    total = int(indptr[len(counts)])
    indptr[len(counts) + 1 :] = total
    return total


def write_hca_list(
    cfg: V4PrepareConfig, step: _Step, hca_indptr: Int32Array, hca_idx: Int32Array
) -> None:
    """Write the rows of all HCA entries visible to each token.

    Later cells are unchanged.

    The tokens of a row see its first entries, so these are computed once a row. Tokens of a row
    between two ends of entries form a run: they see the same entries, and one call copies them.
    Copying takes time for each run, gathering for each entry, so the mean run length selects the
    method. For few tokens, copying each list costs less than finding the runs.
    """
    num_tokens = len(step.row)
    if not num_tokens:
        return
    begins, ends = hca_indptr[:num_tokens], hca_indptr[1 : num_tokens + 1]
    lengths, total = ends - begins, int(ends[-1])
    entries = hca_entries(cfg, step, int(lengths.max()))
    if num_tokens <= _FEW_TOKENS:
        tokens = zip(step.row.tolist(), begins.tolist(), ends.tolist(), strict=True)
        for row, at, stop in tokens:
            hca_idx[at:stop] = entries[row, : stop - at]
        return
    starts = ((step.number == 0) | ((step.position + 1) % cfg.hca_ratio == 0)).nonzero()[0]
    if total < _GATHERED_ENTRIES * len(starts):
        cells = np.arange(total)
        cells += (step.row * np.int64(entries.shape[1]) - begins).repeat(lengths)
        # all cells are inside, and in this mode NumPy writes to `out` without a copy
        entries.reshape(-1).take(cells, out=hca_idx[:total], mode="clip")
        return
    bounds = [*begins[starts].tolist(), total]
    runs = zip(step.row[starts].tolist(), lengths[starts].tolist(), strict=True)
    for (row, length), at, stop in zip(runs, bounds, bounds[1:], strict=False):
        if length == stop - at:
            hca_idx[at:stop] = entries[row, :length]
        else:
            hca_idx[at:stop].reshape(-1, length)[:] = entries[row, :length]


def hca_entries(cfg: V4PrepareConfig, step: _Step, count: int) -> Int32Array:
    """Return the pool rows of each row's first HCA entries, int32 [B, at least `count`].

    Cells after the entries of a row are undefined.
    """
    per_block = cfg.block_size // cfg.hca_ratio
    blocks = step.block_table[:, : -(-count // per_block)].astype(np.int32) * per_block
    inside = np.arange(cfg.comp_base, cfg.comp_base + per_block, dtype=np.int32)
    return (blocks[:, :, None] + inside).reshape(len(blocks), blocks.shape[1] * per_block)


def _write_plans(
    cfg: V4PrepareConfig,
    step: _Step,
    ratio: int,
    plan: Int32Array,
    plan_dst: Int32Array,
    wplan: Int32Array,
) -> tuple[int, int]:
    """Write the plans of one ratio in token order, and return the numbers of their rows."""
    pool, position = cfg.pool(ratio), step.position
    finished = ((position + 1) % ratio == 0).nonzero()[0]
    kept = (position >= (step.ctx - pool)[step.row]).nonzero()[0]
    for array, tokens in ((plan, finished), (wplan, kept)):
        # the step's own tokens up to this one are read from the step, older ones from the ring
        from_ring = np.maximum(pool - 1 - step.number[tokens], 0)
        columns = (tokens, step.row[tokens], position[tokens], from_ring)
        for column, values in enumerate(columns):
            array[: len(tokens), column] = values
        array[len(tokens) :] = -1
    entries = position[finished] // ratio
    per_block = cfg.block_size // ratio
    rows = _pool_rows(step.block_table, step.row[finished], entries, per_block)
    _fill(plan_dst, cfg.comp_base + rows, -1)
    return len(finished), len(kept)


def csa_translate(
    out: V4Arrays, block_table: npt.ArrayLike, local_topk: npt.ArrayLike
) -> Int32Array:
    """Return rows of the CSA entries that the indexer selected, flat by `csa_indptr`.

    row = comp_base + block_table[b, e // n] * n + e % n, n = block_size // csa_ratio

    Runs once for each layer that selects, not for each layer that reads (vLLM #57434, #57659).

    Args:
        out: outputs of the step.
        block_table: [B, columns], the step's block table.
        local_topk: [T or more, index_topk] integers, entry numbers of each token. The first
            min(csa_visible, index_topk) are read.

    Returns:
        int32 [counts[3]]. -1 = the number is not an entry visible to its token.

    Raises:
        ShapeError, DtypeError: `local_topk` or `block_table` has a wrong shape or dtype.
    """
    cfg = out.config
    num_rows, num_tokens = int(out.counts[0]), int(out.counts[1])
    table, selected = np.asarray(block_table), np.asarray(local_topk)
    for name, array in (("block_table", table), ("local_topk", selected)):
        if array.size and array.dtype.kind not in "iu":
            raise DtypeError(f"{name}: got {array.dtype}, must be an integer dtype; convert it")
    check_topk(cfg, selected, num_tokens)
    if num_rows and (table.ndim != 2 or len(table) < num_rows):
        raise ShapeError(
            f"block_table: got {table.shape}, must be [{num_rows} or more, columns]; pass the "
            "table of the step"
        )
    visible = out.csa_visible[:num_tokens, None]
    entry = selected[:num_tokens][np.arange(cfg.index_topk) < visible]
    token = np.repeat(np.arange(num_tokens), np.diff(out.csa_indptr[: num_tokens + 1]))
    seen = (entry >= 0) & (entry < out.csa_visible[token])
    rows = np.full(len(entry), -1, np.int32)
    if seen.any():
        row, per_block = out.req_of_token[token[seen]], cfg.block_size // cfg.csa_ratio
        rows[seen] = cfg.comp_base + _pool_rows(table, row, entry[seen], per_block)
    return rows


def check_topk(cfg: V4PrepareConfig, local_topk: Array, num_tokens: int) -> None:
    """Refuse entry numbers without one row for each token.

    Raises:
        ShapeError: names both shapes.
    """
    shape = tuple(getattr(local_topk, "shape", ()))
    if len(shape) != 2 or shape[0] < num_tokens or shape[1] != cfg.index_topk:
        raise ShapeError(
            f"local_topk: got {shape}, must be [{num_tokens} or more, {cfg.index_topk}]; pass one "
            "row of index_topk entry numbers for each token of the step"
        )
