"""Steps of DeepSeek-V4, staged ahead on the host and expanded where the layers run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import copy
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.host_tensor import as_tensor, host_array
from fd_dsa.errors import BackendUnavailable, DtypeError
from fd_dsa.tensor import Array
from fd_dsa.v4_prepare.builder import V4Arrays, csa_translate, v4_prepare_np
from fd_dsa.v4_prepare.checks import (
    Integers,
    count_tokens,
    raise_first_fault,
    rollback_error,
    step_inputs,
)
from fd_dsa.v4_prepare.config import V4PrepareConfig
from fd_dsa.v4_prepare.table import BlockTable, Run

# NumPy has one object for this dtype
_INT32 = np.dtype(np.int32)
NUM_SLABS = 3
"""Maximum number of steps that are staged and not yet expanded."""


class V4Prepare:
    """Builds all index metadata for the layers of a DeepSeek-V4 step.

    `stage` is host work: it checks a step and enqueues one copy. `expand` enqueues one launch that
    writes all outputs. Up to three steps may be staged while the device computes an earlier one.
    They are expanded in the order of their staging.

    Args:
        cfg: size limits of every step.
        place: "numpy" = NumPy arrays. "cpu" = Paddle CPU tensors. "gpu", "gpu:0" or a custom place
            such as "name:0" = Paddle tensors on that device, filled by one Triton launch.
        allocate: allocator of device tensors, `(shape, dtype name) -> tensor`, for another library
            that the launcher supports. None = Paddle's.

    Attributes:
        buffers: the outputs. Before the first step they hold an empty step.
        table: blocks of all rows.
        steps: staged and expanded steps in the memory of the place.

    Raises:
        BackendUnavailable: no library supports the place.

    Not thread-safe: one object serves one stream of steps.
    """

    def __init__(
        self, cfg: V4PrepareConfig, place: str = "cpu", allocate: Allocate | None = None
    ) -> None:
        self.cfg, self.place = cfg, place
        self.table = BlockTable(cfg)
        # the last step, compared by `_is_repeat`
        self._q = self._slot = b""
        self._room, self._num_tokens = self.table.room, 0
        self.steps = _steps_for(cfg, place, allocate, self.table)
        self.buffers: V4Arrays = self.steps.buffers
        self.stage([], [], [])
        self.expand()

    def set_blocks(self, row: int, block_ids: npt.ArrayLike, start: int = 0) -> None:
        """Set the blocks of a row from column `start` on, for its next step.

        Like `blocks[start:] = block_ids` for a list: later blocks of the row are removed. A new
        request in a row is `set_blocks(row, ids)`. One more block for a request with n blocks is
        `set_blocks(row, [id], n)`.

        Args:
            row: row of the steps.
            block_ids: integers in [0, num_blocks).
            start: at most the number of blocks that the row has.

        Raises:
            ValueError: invalid row or start.
            V4PrepareError: E_DTYPE, E_TABLE or E_BLOCK. The row is unchanged.
        """
        self.table.set_blocks(row, block_ids, start)

    def stage(
        self,
        ctx: npt.ArrayLike,
        q: npt.ArrayLike,
        slot: npt.ArrayLike,
        block_table: npt.ArrayLike | None = None,
    ) -> None:
        """Check the next step and enqueue its copy, without waiting for the device.

        A refused step changes no state. The arrays may be changed after the call.

        Args:
            ctx: [B] integers, tokens of each row after this step. If `expand` gets a rollback, all
                drafts of the previous step count as accepted.
            q: [B], tokens of each row in this step, 0 = idle.
            slot: [B], state slot of each row, distinct for active rows.
            block_table: [B, columns], physical blocks. The first ceil(ctx / block_size) cells of an
                active row become its blocks. None = the blocks of `set_blocks` and earlier steps,
                and then the cost does not grow with ctx.

        Raises:
            V4PrepareError: the first fault, in the order E_SHAPE, E_DTYPE, E_BATCH; E_QLEN, E_CTX,
                E_SLOT, E_TABLE, E_BLOCK row by row; E_TOKENS.
            RuntimeError: three steps are staged and not expanded, or a graph is being captured.

        Cost: a fixed number of NumPy calls and one copy. No allocation grows with ctx. A step whose
        q and slot are int32 arrays equal to those of the previous step is checked in a few
        microseconds.
        """
        if len(self.steps.staged) == NUM_SLABS:
            raise RuntimeError(
                f"stage: {NUM_SLABS} steps are staged and not expanded, no slab is free; "
                "call expand() first"
            )
        has_table = block_table is not None
        if not has_table and self._is_repeat(ctx, q, slot):
            self.steps.stage(ctx, q, slot, self._num_tokens, None)
            return
        if block_table is None:
            block_table = np.empty((np.shape(ctx)[:1] or (0,)) + (0,), np.int32)
        ctx, q, slot, table = step_inputs(self.cfg, ctx, q, slot, block_table)
        num_tokens, runs = count_tokens(self.cfg, ctx, q, slot), None
        if num_tokens >= 0:
            runs = self.table.changes(ctx, q, table if has_table else None)
        if runs is None:
            table = table if has_table else self.table.table_of(len(ctx))
            raise_first_fault(self.cfg, ctx, q, slot, table)
        self.steps.stage(ctx, q, slot, num_tokens, runs)
        # slots of idle rows may exceed int32, but are ignored, so truncating them is safe
        self._q, self._slot = q.astype(np.int32).tobytes(), slot.astype(np.int32).tobytes()
        self._room, self._num_tokens = self.table.room[: len(q)], num_tokens

    def _is_repeat(self, ctx: Any, q: Any, slot: Any) -> bool:
        """Return True for a valid step that differs only in `ctx`, int32, from the last one.

        Remaining checks: a row has at least as many tokens as it adds, and at most as many as its
        blocks hold. A valid step with a long idle row returns False too.
        """
        return (
            type(ctx) is type(q) is type(slot) is np.ndarray
            and ctx.dtype is q.dtype is slot.dtype is _INT32
            and ctx.shape == q.shape == slot.shape == self._room.shape
            and q.tobytes() == self._q
            and slot.tobytes() == self._slot
            # a search in bytes takes a tenth of the time of `any`
            and 1 not in (ctx < q).tobytes()
            and 1 not in (ctx > self._room).tobytes()
        )

    def expand(self, rollback: Array | None = None) -> V4Arrays:
        """Enqueue the launch that writes the outputs of the earliest staged step.

        It runs on the current stream: later work reads the outputs of this step, and earlier work
        those of the previous step. Do not capture it. A graph of layers reads the buffers, whose
        addresses are fixed.

        Args:
            rollback: int32 [n] in the memory of the buffers, or None. Number of draft tokens of
                rows 0..n-1 that the previous step added and the sampler rejected. An active row has
                `ctx - rollback` tokens, rows from n on have ctx. If a device finds rollback < 0 or
                ctx - rollback < q, the tokens of the row become padding, and `poll_error` raises.

        Returns:
            The buffers, always the same object.

        Raises:
            RuntimeError: no step is staged.
            DtypeError, LaunchError: the rollback is not int32 or in other memory. The step stays
                staged.
            V4PrepareError: E_CTX, only in host memory: a row cannot be rolled back so far. The step
                stays staged.
        """
        if not self.steps.staged:
            raise RuntimeError("expand: no step is staged; call stage() first")
        self.steps.expand(rollback)
        return self.buffers

    def poll_error(self) -> None:
        """Raise the earliest error found by the device in a finished step, once.

        Called once a step, it raises one step later. It does not wait. The last error of every
        sixteenth step is stored until it is raised.

        Raises:
            V4PrepareError: E_CTX of the lowest row at fault, with the text of the host's check.
        """
        self.steps.poll_error()

    def csa_translate(self, local_topk: Array) -> Array:
        """Return the rows of the CSA entries that the indexer selected in the expanded step.

        Enqueued like `expand`, once for each layer that selects. Layers that share its selection
        read the same list. The call may be captured in a graph, except the first call, which
        allocates the list.

        Args:
            local_topk: int32 [T or more, index_topk] in the memory of the buffers, contiguous,
                entry numbers. The first min(csa_visible, index_topk) of a token are read.

        Returns:
            int32 [capacity], always the same object. Rows of token t are csa_indptr[t] to
            csa_indptr[t + 1]. -1 = the number is not an entry visible to t.

        Raises:
            ShapeError: `local_topk` has a wrong shape.
        """
        return self.steps.csa_translate(local_topk)


class HostSteps:
    """Steps in host memory. `v4_prepare_np` builds a step when it is expanded.

    Args:
        table: the blocks of all rows.
        view: converts an array to the place's type, sharing its memory.

    Attributes:
        buffers: the outputs.
        staged: ctx, q, slot and block table of the steps that are not expanded yet.
    """

    def __init__(
        self, cfg: V4PrepareConfig, table: BlockTable, view: Callable[[np.ndarray], Array]
    ) -> None:
        self.table = table
        self._out = V4Arrays(cfg)
        self.buffers = copy(self._out)
        for name, value in vars(self._out).items():
            if isinstance(value, np.ndarray):
                setattr(self.buffers, name, view(value))
        self._csa = np.zeros(max(cfg.csa_list_length, 1), np.int32)
        self._csa_view = view(self._csa)
        self.staged: deque[tuple[np.ndarray, ...]] = deque()

    def stage(
        self, ctx: Integers, q: Integers, slot: Integers, num_tokens: int, runs: list[Run] | None
    ) -> None:
        """Store a copy of the step and of its part of the table."""
        self.table.put(runs or [])
        width = -(-int(ctx.max(initial=0)) // self._out.config.block_size)
        self.staged.append(
            (ctx.copy(), q.copy(), slot.copy(), self.table.table_of(len(ctx), width))
        )

    def expand(self, rollback: Array | None) -> None:
        """Build the earliest staged step.

        Raises:
            DtypeError: the rollback is not int32 [n].
            V4PrepareError: E_CTX, invalid rollback of a row. The step stays staged.
        """
        ctx, q, slot, table = self.staged[0]
        if rollback is not None:
            ctx = _rolled_back(ctx, q, host_array("rollback", rollback))
        v4_prepare_np(self._out.config, ctx, q, slot, table, out=self._out)
        self._out.block_table[: len(table), : table.shape[1]] = table
        self.staged.popleft()

    def poll_error(self) -> None:
        """Do not raise: `expand` has raised all errors already."""

    def csa_translate(self, local_topk: Array) -> Array:
        """Return the rows of selected entries, at a fixed address. See `V4Prepare`."""
        selected = host_array("local_topk", local_topk)
        rows = csa_translate(self._out, self._out.block_table, selected)
        self._csa[: len(rows)] = rows
        return self._csa_view


def _rolled_back(ctx: Integers, q: Integers, rollback: Integers) -> Integers:
    """Return the contexts of active rows without the tokens rejected before the step."""
    if rollback.dtype != np.int32 or rollback.ndim != 1:
        raise DtypeError(
            f"rollback: got {rollback.dtype} of shape {rollback.shape}, must be int32 [n]; "
            "convert it"
        )
    taken = np.zeros(len(q), np.int64)
    taken[: len(rollback)] = rollback[: len(q)]
    taken[q == 0] = 0
    left = ctx.astype(np.int64) - taken
    is_bad = (taken < 0) | (left < q)
    if is_bad.any():
        row = int(is_bad.argmax())
        raise rollback_error(row, int(taken[row]), int(left[row]), int(q[row]))
    return left


def _steps_for(
    cfg: V4PrepareConfig, place: str, allocate: Allocate | None, table: BlockTable
) -> Any:
    """Return the object that stages and expands steps in a place."""
    if allocate is None and place == "numpy":
        return HostSteps(cfg, table, lambda array: array)
    if allocate is None and place == "cpu":
        if find_spec("paddle") is None:
            raise BackendUnavailable(
                "place: 'cpu' needs Paddle, which is not installed; install fd_dsa[cpu], or take "
                "place='numpy'"
            )
        return HostSteps(cfg, table, as_tensor)
    # imported late, because only devices need the launcher
    from fd_dsa.device.allocation import paddle_allocator
    from fd_dsa.v4_prepare.launch import DeviceSteps

    return DeviceSteps(cfg, allocate or paddle_allocator(place), table, NUM_SLABS)
