"""Checks of a step's inputs, which all run before the first write.

`count_tokens` and `BlockTable.changes` detect an invalid step with a fixed number of NumPy calls.
Only then `raise_first_fault` checks the rows in order and names the fault.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.config import V4PrepareConfig

# array of any integer dtype
Integers: TypeAlias = npt.NDArray[Any]

_NAMES = ("ctx", "q", "slot", "block_table")


def step_inputs(
    cfg: V4PrepareConfig,
    ctx: npt.ArrayLike,
    q: npt.ArrayLike,
    slot: npt.ArrayLike,
    block_table: npt.ArrayLike,
) -> list[Integers]:
    """Return the inputs as integer arrays: three [B], and a table [B, columns].

    Raises:
        V4PrepareError: E_SHAPE, E_DTYPE or E_BATCH.
    """
    pairs = zip(_NAMES, (ctx, q, slot, block_table), strict=True)
    arrays = [_as_array(name, value) for name, value in pairs]
    rows = arrays[0].shape
    if arrays[3].shape == (0,) == rows:
        # an empty list has one axis, a table has two
        arrays[3] = arrays[3].reshape(0, 0)
    shapes = [array.shape for array in arrays]
    is_table = len(shapes[3]) == 2 and shapes[3][:1] == rows
    if len(rows) != 1 or shapes[1:3] != [rows, rows] or not is_table:
        _raise_shape()
    for index, (name, array) in enumerate(zip(_NAMES, arrays, strict=True)):
        if array.size == 0:
            # an empty list has no dtype
            arrays[index] = array.astype(np.int32)
        elif array.dtype.kind not in "iu":
            text = f"{name} has dtype {array.dtype}, must be an integer dtype"
            raise V4PrepareError("E_DTYPE", -1, text)
    if rows[0] > cfg.max_num_seqs:
        raise V4PrepareError("E_BATCH", -1, f"B={rows[0]} > Bcap={cfg.max_num_seqs}")
    return arrays


def count_tokens(cfg: V4PrepareConfig, ctx: Integers, q: Integers, slot: Integers) -> int:
    """Count the tokens of a step, and check its lengths, slots and total.

    Args:
        ctx, q, slot: [B].

    Returns:
        The number of tokens; -1 for an invalid step.

    Cost: about 12 NumPy calls on [B], a few microseconds at B = 256.
    """
    # int64, so that no input wraps into a plausible number; read as unsigned, a negative number
    # exceeds every bound
    lengths = np.empty((3, len(q)), np.int64)
    lengths[0], lengths[1] = ctx, q
    np.subtract(lengths[0], lengths[1], out=lengths[2])
    longest, max_new, before = lengths.view(np.uint64).max(axis=1, initial=0).tolist()
    num_tokens = int(lengths[1].sum())
    if (
        max(longest, before) > cfg.max_model_len
        or max_new > cfg.max_tokens_per_seq
        or num_tokens > cfg.max_num_tokens
    ):
        return -1
    ordered = slot[q > 0]
    ordered.sort()
    is_good = not len(ordered) or (
        ordered[0] >= 0
        and ordered[-1] < cfg.num_slots
        and not np.count_nonzero(ordered[1:] == ordered[:-1])
    )
    return num_tokens if is_good else -1


def num_blocks_needed(cfg: V4PrepareConfig, ctx: Integers, q: Integers) -> npt.NDArray[np.int64]:
    """Return the number of blocks that each row needs: [B], 0 for idle rows."""
    return -(-ctx.astype(np.int64) // cfg.block_size) * (q > 0)


def cells_are_good(cells: Integers, num_blocks: int) -> npt.NDArray[np.bool_]:
    """Return True for each valid cell of a block table: 0 <= cell < num_blocks."""
    return (cells >= 0) & (cells < num_blocks)


def check_step(
    cfg: V4PrepareConfig, ctx: Integers, q: Integers, slot: Integers, table: Integers
) -> int:
    """Check the rows, table and total of a step, and return its number of tokens.

    Raises:
        V4PrepareError: E_QLEN, E_CTX, E_SLOT, E_TABLE, E_BLOCK of the first row at fault, or
            E_TOKENS.
    """
    num_tokens = count_tokens(cfg, ctx, q, slot)
    if num_tokens >= 0:
        needed = num_blocks_needed(cfg, ctx, q)
        width = int(needed.max(initial=0))
        is_free = np.arange(width) >= needed[:, None]
        if (
            width <= table.shape[1]
            and (cells_are_good(table[:, :width], cfg.num_blocks) | is_free).all()
        ):
            return num_tokens
    raise_first_fault(cfg, ctx, q, slot, table)


def raise_first_fault(
    cfg: V4PrepareConfig, ctx: Integers, q: Integers, slot: Integers, table: Integers
) -> NoReturn:
    """Check the rows of an invalid step in order and raise the first fault.

    Raises:
        V4PrepareError: always.
    """
    owners: dict[int, int] = {}
    rows = zip(ctx.tolist(), q.tolist(), slot.tolist(), strict=True)
    for row, (length, new, owner) in enumerate(rows):
        for is_bad, code, text in (
            (new < 0, "E_QLEN", f"q={new} < 0"),
            (new > cfg.max_tokens_per_seq, "E_QLEN", f"q={new} > Qcap={cfg.max_tokens_per_seq}"),
            (length < 0, "E_CTX", f"ctx={length} < 0"),
            (length < new, "E_CTX", f"ctx={length} < q={new}"),
            (length > cfg.max_model_len, "E_CTX", f"ctx={length} > Lmax={cfg.max_model_len}"),
            (
                new and not 0 <= owner < cfg.num_slots,
                "E_SLOT",
                f"slot={owner} not in [0, {cfg.num_slots})",
            ),
            (
                new and owner in owners,
                "E_SLOT",
                f"slot={owner} already used by row {owners.get(owner)}",
            ),
        ):
            if is_bad:
                raise V4PrepareError(code, row, text)
        if new:
            owners[owner] = row
            needed = -(-length // cfg.block_size)
            check_cells(cfg, row, table[row, :needed].tolist(), needed, table.shape[1])
    num_tokens = sum(q.tolist())
    if num_tokens > cfg.max_num_tokens:
        raise V4PrepareError("E_TOKENS", -1, f"T={num_tokens} > Tcap={cfg.max_num_tokens}")
    raise AssertionError("a step was refused in which no row is at fault")


def check_cells(
    cfg: V4PrepareConfig, row: int, cells: list[int], needed: int, columns: int, first: int = 0
) -> None:
    """Check cells of a row of the block table.

    Args:
        cells: values of the cells from column `first` on.
        needed: number of blocks that the row needs.
        columns: number of columns of the table.

    Raises:
        V4PrepareError: E_TABLE or E_BLOCK.
    """
    if needed > columns:
        raise V4PrepareError("E_TABLE", row, f"needs {needed} blocks, table has {columns} columns")
    for column, block in enumerate(cells, first):
        if not 0 <= block < cfg.num_blocks:
            text = f"block_table[{column}]={block} not in [0, {cfg.num_blocks})"
            raise V4PrepareError("E_BLOCK", row, text)


def rollback_error(row: int, rollback: int, left: int, q: int) -> V4PrepareError:
    """Return the error of a row that cannot be rolled back to `left` tokens."""
    text = f"rollback={rollback} < 0" if rollback < 0 else f"ctx={left} < q={q}"
    return V4PrepareError("E_CTX", row, text)


def _as_array(name: str, value: npt.ArrayLike) -> Integers:
    """Convert an array, a list or a tuple to an array."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, (list, tuple)):
        kind = type(value).__name__
        text = f"{name} is a {kind}, must be a NumPy array of integers or a list"
        raise V4PrepareError("E_DTYPE", -1, text)
    try:
        return np.asarray(value)
    except ValueError:
        # rows of different lengths
        _raise_shape()


def _raise_shape() -> NoReturn:
    raise V4PrepareError("E_SHAPE", -1, "ctx, q, slot must be [B], block_table [B, MB]")
