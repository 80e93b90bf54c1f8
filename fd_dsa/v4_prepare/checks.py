"""What the inputs of a step must satisfy; everything here runs before the first write.

`StepChecks` only finds out whether a step is good, in a fixed number of NumPy calls. Where it is
not, `raise_first_fault` walks over the rows in order and names the first fault.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.config import V4PrepareConfig

_NAMES = ("ctx", "q", "slot", "block_table")
# NumPy has one object for it
_INT32 = np.dtype(np.int32)
_ZERO = np.zeros((), np.int32)


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
    shapes = [array.shape for array in arrays]
    table = shapes[3]
    if len(rows) != 1 or shapes[1:3] != [rows, rows] or len(table) != 2 or table[:1] != rows:
        _raise_shape()
    for index, (name, array) in enumerate(zip(_NAMES, arrays, strict=True)):
        if array.size == 0:
            # an empty list has no dtype of its own
            arrays[index] = array.astype(np.int32)
        elif array.dtype.kind not in "iu":
            raise V4PrepareError(
                "E_DTYPE", -1, f"{name} has dtype {array.dtype}, must be an integer dtype"
            )
    if rows[0] > cfg.max_num_seqs:
        raise V4PrepareError("E_BATCH", -1, f"B={rows[0]} > Bcap={cfg.max_num_seqs}")
    return StepInputs(*arrays)


class StepChecks:
    """Finds out in few NumPy calls whether a step is good.

    Decode steps mostly differ from the step before in `ctx` alone. Their slots and numbers of
    tokens are good again, and what is left is that each row's context is between two bounds:
    `is_repeat` takes one subtraction and one comparison. It owns scratch memory, so one object
    serves one thread.
    """

    def __init__(self, cfg: V4PrepareConfig) -> None:
        self._cfg = cfg
        # int64, so that no input wraps into a plausible number; read as unsigned, a negative
        # number is above every bound
        self._values = np.empty((3, cfg.max_num_seqs), np.int64)
        self._unsigned = self._values.view(np.uint64)
        longest = cfg.max_model_len
        self._bounds = np.array([[longest], [cfg.max_tokens_per_seq], [longest]], np.uint64)
        # the last good step, and for which state of the table its bounds hold
        self._shape: tuple[int, ...] = (-1,)
        self._q, self._slot = np.empty((2, 0), np.int32)
        self._q_bytes = self._slot_bytes = b""
        self._version = -1

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
        if total > self._cfg.max_num_tokens or not self._slots_are_good(values[1], slot):
            return -1
        return total

    def _slots_are_good(self, q: npt.NDArray[Any], slot: npt.NDArray[Any]) -> bool:
        """Whether the slots of active rows are in range and all different."""
        if np.count_nonzero(q) < len(q):
            slot = slot[q > 0]
        if len(slot) == 0:
            return True
        ordered = np.sort(slot)
        return bool(
            ordered[0] >= 0
            and ordered[-1] < self._cfg.num_slots
            and not np.count_nonzero(ordered[1:] == ordered[:-1])
        )

    def remember(self, q: npt.NDArray[Any], slot: npt.NDArray[Any]) -> None:
        """Take a step that has passed all checks as the last one; q and slot [B], any integers."""
        # the slot of an idle row may be any number: some bits of it matter as little as all
        self._q, self._shape = q.astype(np.int32), q.shape
        self._q_bytes = self._q.tobytes()
        self._slot_bytes = slot.astype(np.int32, copy=False).tobytes()
        self._version = -1

    def is_repeat(self, ctx: Any, q: Any, slot: Any, table: Any) -> bool:
        """Whether a step with the table as it is is good and differs from the last in `ctx` alone.

        Args:
            ctx, q, slot: whatever the caller got.
            table: the `TableMirror`.

        Returns:
            False also of good steps that differ in more, or are not of int32 arrays [B].
        """
        if not (
            type(ctx) is type(q) is type(slot) is np.ndarray
            and ctx.dtype is q.dtype is slot.dtype is _INT32
            and ctx.shape == q.shape == slot.shape == self._shape
            and q.tobytes() == self._q_bytes
            and slot.tobytes() == self._slot_bytes
        ):
            return False
        if self._version != table.version:
            self._set_bounds(table)
        np.subtract(ctx, q, out=self._start)
        np.greater_equal(self._start_unsigned, self._start_bounds, out=self._is_bad)
        # a search in bytes costs a tenth of `any`
        return 1 not in self._is_bad.tobytes()

    def _set_bounds(self, table: Any) -> None:
        """What `ctx - q` of each row must be below: room - q + 1, and 0 where that is negative."""
        q = self._q
        if self._version < 0:
            self._start = np.empty(len(q), np.int32)
            self._start_unsigned = self._start.view(np.uint32)
            self._is_bad = np.empty(len(q), np.bool_)
            self._q_less_1, self._idle = q - 1, np.flatnonzero(q == 0)
        room = table.room(len(q))
        room -= self._q_less_1
        bounds = np.maximum(room, _ZERO, out=room).view(np.uint32)
        if len(self._idle):
            # their blocks do not matter; one above the longest context may pass int32
            bounds[self._idle] = self._cfg.max_model_len + 1
        self._start_bounds, self._version = bounds, table.version


def rows_have_room(ctx: npt.NDArray[Any], q: npt.NDArray[Any], room: npt.NDArray[Any]) -> bool:
    """Whether every active row's tokens fit the blocks it has: `room` [B] is in tokens."""
    short = ctx > room
    return not np.count_nonzero(short) or not np.count_nonzero(short & (q > 0))


def cells_are_good(cells: npt.NDArray[Any], num_blocks: int) -> npt.NDArray[np.bool_]:
    """Whether each cell of a block table names a block: 0 <= cell < num_blocks."""
    if cells.dtype.kind == "u":
        return cells < num_blocks
    return cells.view(cells.dtype.str.replace("i", "u")) < num_blocks


def check_step(cfg: V4PrepareConfig, inputs: StepInputs) -> int:
    """T of a step that passes all checks of rows, table and tokens.

    Raises:
        V4PrepareError: E_QLEN, E_CTX, E_SLOT, E_TABLE, E_BLOCK of the first row at fault, else
            E_TOKENS.
    """
    ctx, q, slot, table = inputs
    num_tokens = StepChecks(cfg).num_tokens(ctx, q, slot)
    if num_tokens >= 0:
        needed = -(-ctx.astype(np.int64) // cfg.block_size) * (q > 0)
        width = int(needed.max(initial=0))
        if width <= table.shape[1]:
            is_free = np.arange(width) >= needed[:, None]
            if (cells_are_good(table[:, :width], cfg.num_blocks) | is_free).all():
                return num_tokens
    raise_first_fault(cfg, inputs)


def raise_first_fault(cfg: V4PrepareConfig, inputs: StepInputs) -> NoReturn:
    """Walk over the rows of a step that is at fault, and name the first fault.

    Raises:
        V4PrepareError: always.
    """
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
        needed, columns = -(-ctx // cfg.block_size), inputs.block_table.shape[1]
        check_cells(cfg, row, inputs.block_table[row, :needed].tolist(), needed, columns)
    num_tokens = sum(inputs.q.tolist())
    if num_tokens > cfg.max_num_tokens:
        raise V4PrepareError("E_TOKENS", -1, f"T={num_tokens} > Tcap={cfg.max_num_tokens}")
    raise AssertionError("a step was refused in which no row is at fault")


def _check_lengths(cfg: V4PrepareConfig, row: int, ctx: int, q: int) -> None:
    """Refuse the lengths of one row."""
    for is_bad, code, text in (
        (q < 0, "E_QLEN", f"q={q} < 0"),
        (q > cfg.max_tokens_per_seq, "E_QLEN", f"q={q} > Qcap={cfg.max_tokens_per_seq}"),
        (ctx < 0, "E_CTX", f"ctx={ctx} < 0"),
        (ctx < q, "E_CTX", f"ctx={ctx} < q={q}"),
        (ctx > cfg.max_model_len, "E_CTX", f"ctx={ctx} > Lmax={cfg.max_model_len}"),
    ):
        if is_bad:
            raise V4PrepareError(code, row, text)


def check_cells(
    cfg: V4PrepareConfig, row: int, cells: list[int], needed: int, columns: int, first: int = 0
) -> None:
    """Refuse cells from column `first` on, of a row that needs `needed` blocks of a table."""
    if needed > columns:
        raise V4PrepareError("E_TABLE", row, f"needs {needed} blocks, table has {columns} columns")
    for column, block in enumerate(cells, first):
        if not 0 <= block < cfg.num_blocks:
            text = f"block_table[{column}]={block} not in [0, {cfg.num_blocks})"
            raise V4PrepareError("E_BLOCK", row, text)


def rollback_error(row: int, is_negative: bool, value: int, limit: int) -> V4PrepareError:
    """The error of a row that cannot be rolled back, in the words of the other checks."""
    text = f"rollback={value} < 0" if is_negative else f"ctx={value} < q={limit}"
    return V4PrepareError("E_CTX", row, text)


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
