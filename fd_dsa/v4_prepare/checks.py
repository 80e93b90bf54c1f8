"""What the inputs of a step must satisfy; everything here runs before the first write.

The fast path only finds out whether a step is good, in a fixed number of NumPy calls. Where it is
not, `raise_first_fault` walks over the rows in order and names the first fault.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.config import V4PrepareConfig

IntArray = npt.NDArray[np.signedinteger[Any]]

_NAMES = ("ctx", "q", "slot", "block_table")


class StepInputs(NamedTuple):
    """The inputs of a step as NumPy arrays of any integer dtype: [B] three times, [B, columns]."""

    ctx: npt.NDArray[Any]
    q: npt.NDArray[Any]
    slot: npt.NDArray[Any]
    block_table: npt.NDArray[Any]


def step_inputs(cfg: V4PrepareConfig, ctx: Any, q: Any, slot: Any, block_table: Any) -> StepInputs:
    """The inputs as arrays whose shapes and dtypes are right.

    Raises:
        V4PrepareError: E_SHAPE, E_DTYPE or E_BATCH.
    """
    arrays = [_as_array(*pair) for pair in zip(_NAMES, (ctx, q, slot, block_table), strict=True)]
    rows = arrays[0].shape
    if arrays[3].shape == (0,) == rows:
        # the table of no rows, as a list
        arrays[3] = arrays[3].reshape(0, 0)
    check_shapes([array.shape for array in arrays])
    for index, (name, array) in enumerate(zip(_NAMES, arrays, strict=True)):
        if array.size == 0:
            # an empty list has no dtype of its own
            arrays[index] = array.astype(np.int32)
        elif array.dtype.kind not in "iu":
            raise V4PrepareError(
                "E_DTYPE", -1, f"{name} has dtype {array.dtype}, must be an integer dtype"
            )
    check_batch(cfg, rows[0])
    return StepInputs(*arrays)


def check_shapes(shapes: list[tuple[int, ...]]) -> None:
    """Refuse shapes other than [B] three times and [B, columns].

    Raises:
        V4PrepareError: E_SHAPE.
    """
    rows, table = shapes[0], shapes[3]
    if len(rows) != 1 or shapes[1:3] != [rows, rows] or len(table) != 2 or table[:1] != rows:
        _raise_shape()


def check_batch(cfg: V4PrepareConfig, num_rows: int) -> None:
    """Refuse more rows than the buffers hold.

    Raises:
        V4PrepareError: E_BATCH.
    """
    if num_rows > cfg.max_num_seqs:
        raise V4PrepareError("E_BATCH", -1, f"B={num_rows} > Bcap={cfg.max_num_seqs}")


class RowChecks:
    """Finds out in few NumPy calls whether the lengths and slots of a step are good.

    It owns scratch memory, so one object serves one thread.
    """

    def __init__(self, cfg: V4PrepareConfig) -> None:
        self._num_slots = cfg.num_slots
        self._max_num_tokens = cfg.max_num_tokens
        # int64, so that no input wraps into a plausible number; read as unsigned, a negative
        # number lies past every bound
        self._values = np.empty((3, cfg.max_num_seqs), np.int64)
        self._unsigned = self._values.view(np.uint64)
        self._bounds = np.array(
            [[cfg.max_model_len], [cfg.max_tokens_per_seq], [cfg.max_model_len]], np.uint64
        )

    def num_tokens(self, ctx: npt.NDArray[Any], q: npt.NDArray[Any], slot: npt.NDArray[Any]) -> int:
        """T of a step whose lengths, slots and number of tokens are good; -1 of any other.

        Args:
            ctx, q, slot: [B], B <= Bcap, any integer dtype.

        Cost: about 12 NumPy calls on [B], a few microseconds at B = 256.
        """
        num_rows = len(q)
        values = self._values[:, :num_rows]
        values[0] = ctx
        values[1] = q
        np.subtract(values[0], values[1], out=values[2])
        if np.count_nonzero(self._unsigned[:, :num_rows] > self._bounds):
            return -1
        total = int(np.add.reduce(values[1]))
        if total > self._max_num_tokens or not self._slots_are_good(values[1], slot):
            return -1
        return total

    def _slots_are_good(self, q: IntArray, slot: npt.NDArray[Any]) -> bool:
        """Whether the slots of active rows are in range and all different."""
        if np.count_nonzero(q) < len(q):
            slot = slot[q > 0]
        if len(slot) == 0:
            return True
        ordered = np.sort(slot)
        return bool(
            ordered[0] >= 0
            and ordered[-1] < self._num_slots
            and not np.count_nonzero(ordered[1:] == ordered[:-1])
        )


def rows_have_room(ctx: npt.NDArray[Any], q: npt.NDArray[Any], room: npt.NDArray[Any]) -> bool:
    """Whether every active row's tokens fit the blocks it has.

    Args:
        ctx, q: [B].
        room: [B]; tokens that the leading good cells of each row's block table hold
            (`leading_blocks(...) * block_size`).
    """
    short = ctx > room
    return not np.count_nonzero(short) or not np.count_nonzero(short & (q > 0))


def cells_are_good(cells: npt.NDArray[Any], num_blocks: int) -> npt.NDArray[np.bool_]:
    """Whether each cell of a block table names a block: 0 <= cell < num_blocks."""
    if cells.dtype.kind == "u":
        return cells < num_blocks
    return cells.view(cells.dtype.str.replace("i", "u")) < num_blocks


def leading_blocks(table: npt.NDArray[Any], num_blocks: int) -> npt.NDArray[np.intp]:
    """int [B]: how many cells of each row [B, columns] name a block before the first that does not.

    Cost: one pass over the table; for the cells that changed, or once a step on a host.
    """
    bad = ~cells_are_good(table, num_blocks)
    if not bad.shape[1]:
        return np.zeros(len(bad), np.intp)
    first = bad.argmax(axis=1)
    # argmax is 0 as well where no cell is bad
    first[~bad[np.arange(len(bad)), first]] = bad.shape[1]
    return first


def check_step(cfg: V4PrepareConfig, inputs: StepInputs) -> int:
    """T of a step that passes all checks of rows, table and tokens.

    Raises:
        V4PrepareError: E_QLEN, E_CTX, E_SLOT, E_TABLE, E_BLOCK of the first row at fault, else
            E_TOKENS.
    """
    ctx, q, slot, table = inputs
    num_tokens = RowChecks(cfg).num_tokens(ctx, q, slot)
    if num_tokens >= 0:
        # cells that no row of the step needs are nobody's business
        num_columns = -(-int(ctx.max(initial=0)) // cfg.block_size)
        room = leading_blocks(table[:, :num_columns], cfg.num_blocks) * cfg.block_size
        if rows_have_room(ctx, q, room):
            return num_tokens
    raise_first_fault(cfg, inputs)


def raise_first_fault(cfg: V4PrepareConfig, inputs: StepInputs) -> NoReturn:
    """Walk over the rows of a step that is at fault, and name the first fault.

    Raises:
        V4PrepareError: always.
    """
    table = inputs.block_table
    owners: dict[int, int] = {}
    rows = zip(*(array.tolist() for array in inputs[:3]), strict=True)
    for row, (ctx, q, slot) in enumerate(rows):
        _check_lengths(cfg, row, ctx, q)
        if q == 0:
            continue
        if not 0 <= slot < cfg.num_slots:
            raise V4PrepareError("E_SLOT", row, f"slot={slot} not in [0, {cfg.num_slots})")
        if slot in owners:
            raise V4PrepareError("E_SLOT", row, f"slot={slot} already used by row {owners[slot]}")
        owners[slot] = row
        _check_cells(cfg, row, -(-ctx // cfg.block_size), table)
    num_tokens = sum(inputs.q.tolist())
    if num_tokens > cfg.max_num_tokens:
        raise V4PrepareError("E_TOKENS", -1, f"T={num_tokens} > Tcap={cfg.max_num_tokens}")
    raise AssertionError("a step was refused in which no row is at fault")


def _check_lengths(cfg: V4PrepareConfig, row: int, ctx: int, q: int) -> None:
    """Refuse the lengths of one row."""
    if q < 0:
        raise V4PrepareError("E_QLEN", row, f"q={q} < 0")
    if q > cfg.max_tokens_per_seq:
        raise V4PrepareError("E_QLEN", row, f"q={q} > Qcap={cfg.max_tokens_per_seq}")
    if ctx < 0:
        raise V4PrepareError("E_CTX", row, f"ctx={ctx} < 0")
    if ctx < q:
        raise V4PrepareError("E_CTX", row, f"ctx={ctx} < q={q}")
    if ctx > cfg.max_model_len:
        raise V4PrepareError("E_CTX", row, f"ctx={ctx} > Lmax={cfg.max_model_len}")


def _check_cells(cfg: V4PrepareConfig, row: int, needed: int, table: npt.NDArray[Any]) -> None:
    """Refuse the part of the block table that one row needs."""
    if needed > table.shape[1]:
        raise V4PrepareError(
            "E_TABLE", row, f"needs {needed} blocks, table has {table.shape[1]} columns"
        )
    for column, block in enumerate(table[row, :needed].tolist()):
        if not 0 <= block < cfg.num_blocks:
            raise V4PrepareError(
                "E_BLOCK", row, f"block_table[{column}]={block} not in [0, {cfg.num_blocks})"
            )


def _as_array(name: str, value: Any) -> npt.NDArray[Any]:
    """An array or a list as an array."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, (list, tuple)):
        raise V4PrepareError(
            "E_DTYPE",
            -1,
            f"{name} is a {type(value).__name__}, must be a NumPy array of integers or a list",
        )
    try:
        return np.asarray(value)
    except ValueError:
        # rows of different lengths
        _raise_shape()


def _raise_shape() -> NoReturn:
    raise V4PrepareError("E_SHAPE", -1, "ctx, q, slot must be [B], block_table [B, MB]")
