"""Steps of DeepSeek-V4: staged ahead by the host, expanded where the layers run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import copy
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.device.host_tensor import as_tensor, host_array
from fd_dsa.errors import BackendUnavailable, DtypeError
from fd_dsa.v4_prepare.builder import Allocate, Array, V4Arrays, csa_translate, v4_prepare_np
from fd_dsa.v4_prepare.checks import (
    Integers,
    count_tokens,
    raise_first_fault,
    rollback_error,
    step_inputs,
)
from fd_dsa.v4_prepare.config import V4PrepareConfig
from fd_dsa.v4_prepare.table import BlockTable, Run

# NumPy has one object for it
_INT32 = np.dtype(np.int32)
NUM_SLABS = 3
"""Steps that may be staged and not yet expanded."""


class V4Prepare:
    """Builds everything that the layers of a DeepSeek-V4 step know about their tokens.

    `stage` is host work: it checks a step and queues one copy. `expand` queues one launch that
    writes all outputs. A step may be staged while the device computes the one before, up to three
    ahead; they are expanded in the order in which they were staged.

    Args:
        cfg: sizes that every step keeps to.
        place: "numpy" = NumPy arrays; "cpu" = Paddle CPU tensors; "gpu", "gpu:0" or a custom place
            such as "name:0" = Paddle tensors there, filled by one Triton launch.
        allocate: how tensors on a device are made, `(shape, dtype name) -> tensor`, for tensors of
            another library that the launcher knows; None = Paddle's.

    Attributes:
        buffers: the outputs; before the first step they hold an empty one.
        table: blocks of all rows.
        steps: steps in memory of the place, staged and expanded in order.

    Raises:
        BackendUnavailable: no library serves the place.

    Not thread-safe: one object serves one stream of steps.
    """

    def __init__(
        self, cfg: V4PrepareConfig, place: str = "cpu", allocate: Allocate | None = None
    ) -> None:
        self.cfg, self.place = cfg, place
        self.table = BlockTable(cfg)
        # the last step, as `_is_repeat` compares it
        self._q = self._slot = b""
        self._room, self._num_tokens = self.table.room, 0
        self.steps = _steps_for(cfg, place, allocate, self.table)
        self.buffers: V4Arrays = self.steps.buffers
        self.stage([], [], [])
        self.expand()

    def set_blocks(self, row: int, block_ids: npt.ArrayLike, start: int = 0) -> None:
        """Set the blocks that a row has from column `start` on, for its next step.

        As `blocks[start:] = block_ids` does for a list: the row has no block after them. A new
        request in a row is `set_blocks(row, ids)`; one more block for a request that has n is
        `set_blocks(row, [id], n)`.

        Args:
            row: row of the steps.
            block_ids: integers in [0, num_blocks).
            start: at most the number of blocks that the row has.

        Raises:
            ValueError: no such row or start.
            V4PrepareError: E_DTYPE, E_TABLE or E_BLOCK; the row is as it was.
        """
        self.table.set_blocks(row, block_ids, start)

    def stage(
        self,
        ctx: npt.ArrayLike,
        q: npt.ArrayLike,
        slot: npt.ArrayLike,
        block_table: npt.ArrayLike | None = None,
    ) -> None:
        """Check the next step and queue its copy; the device is not waited for.

        A step that is refused changes nothing. The arrays may be changed after the call.

        Args:
            ctx: [B] integers; tokens of each row after this step, all drafts of the step before
                counted as kept where `expand` gets a rollback.
            q: [B]; tokens of each row in this step, 0 = idle.
            slot: [B]; state slot of each row, no two active rows alike.
            block_table: [B, columns]; physical blocks. The first ceil(ctx / block_size) cells of
                an active row are its blocks from now on. None = those of `set_blocks` and of
                the steps before: then the cost does not grow with ctx.

        Raises:
            V4PrepareError: the first fault, in the order E_SHAPE, E_DTYPE, E_BATCH; E_QLEN, E_CTX,
                E_SLOT, E_TABLE, E_BLOCK row by row; E_TOKENS.
            RuntimeError: three steps are staged and not expanded, or a graph is being captured.

        Cost: a fixed number of NumPy calls, one copy; nothing that grows with ctx is allocated. A
        step whose q and slot are int32 arrays equal to those of the last one is checked in a few
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
        # the slot of an idle row may be any number: some bits of it matter as little as all
        self._q, self._slot = q.astype(np.int32).tobytes(), slot.astype(np.int32).tobytes()
        self._room, self._num_tokens = self.table.room[: len(q)], num_tokens

    def _is_repeat(self, ctx: Any, q: Any, slot: Any) -> bool:
        """Whether int32 arrays are a good step that differs from the last one in `ctx` alone.

        What is left to check is that a row's tokens are no fewer than it adds and no more than its
        blocks hold. False also of a good step in which an idle row has more than that.
        """
        return (
            type(ctx) is type(q) is type(slot) is np.ndarray
            and ctx.dtype is q.dtype is slot.dtype is _INT32
            and ctx.shape == q.shape == slot.shape == self._room.shape
            and q.tobytes() == self._q
            and slot.tobytes() == self._slot
            # a search in bytes takes a tenth of `any`
            and 1 not in (ctx < q).tobytes()
            and 1 not in (ctx > self._room).tobytes()
        )

    def expand(self, rollback: Array | None = None) -> V4Arrays:
        """Queue the launch that writes the outputs of the earliest staged step.

        On the current stream: work queued after it reads the outputs of this step, and work
        queued before it those of the step before. Not to be captured; a graph of layers reads the
        buffers, which never move.

        Args:
            rollback: int32 [n] in the memory of the buffers, or None; tokens of rows 0..n-1 that
                the step before drafted and the sampler rejected. An active row has `ctx -
                rollback` tokens; rows from n on have ctx. Where that cannot be (rollback < 0 or
                ctx - rollback < q), on a device, the tokens of the row become padding, and
                `poll_error` raises.

        Returns:
            The buffers, always the same.

        Raises:
            RuntimeError: no step is staged.
            DtypeError, LaunchError: the rollback is not int32 or is elsewhere; the step is still
                staged.
            V4PrepareError: E_CTX, in host memory: a row cannot be rolled back so far; likewise.
        """
        if not self.steps.staged:
            raise RuntimeError("expand: no step is staged; call stage() first")
        self.steps.expand(rollback)
        return self.buffers

    def poll_error(self) -> None:
        """Raise the earliest error that only the device could see, if its step has run; once.

        Called once a step, it raises one step later. Nothing is waited for. The last error of
        every sixteenth step is kept until it is raised.

        Raises:
            V4PrepareError: E_CTX of the lowest row at fault, with the text of the host's check.
        """
        self.steps.poll_error()

    def csa_translate(self, local_topk: Array) -> Array:
        """Rows of the CSA entries that the indexer chose for the tokens of the expanded step.

        Queued like `expand`, once for each layer that chooses; layers that share its choice read
        the same list. The call may be captured in a graph, but not the first one, which makes the
        list.

        Args:
            local_topk: int32 [T or more, index_topk] in the memory of the buffers, contiguous;
                entry numbers, of which the first min(csa_visible, index_topk) of a token are read.

        Returns:
            int32 [capacity], always the same: token t's rows go from csa_indptr[t] to
            csa_indptr[t + 1], -1 where a number is no entry that t sees.

        Raises:
            ShapeError: `local_topk` has another shape.
        """
        return self.steps.csa_translate(local_topk)


class HostSteps:
    """Steps in host memory; a step is built by `v4_prepare_np` when it is expanded.

    Args:
        table: the blocks of all rows.
        view: how an array becomes one of the place, on the same memory.

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
        """Keep a copy of the step and of its part of the table."""
        self.table.put(runs or [])
        width = -(-int(ctx.max(initial=0)) // self._out.config.block_size)
        self.staged.append(
            (ctx.copy(), q.copy(), slot.copy(), self.table.table_of(len(ctx), width))
        )

    def expand(self, rollback: Array | None) -> None:
        """Build the earliest staged step.

        Raises:
            DtypeError: the rollback is not int32 [n].
            V4PrepareError: E_CTX, the rollback of a row cannot be; the step is still staged.
        """
        ctx, q, slot, table = self.staged[0]
        if rollback is not None:
            ctx = _rolled_back(ctx, q, host_array("rollback", rollback))
        v4_prepare_np(self._out.config, ctx, q, slot, table, out=self._out)
        self._out.block_table[: len(table), : table.shape[1]] = table
        self.staged.popleft()

    def poll_error(self) -> None:
        """Nothing: `expand` raises at once."""

    def csa_translate(self, local_topk: Array) -> Array:
        """The rows of chosen entries, at one address; see `V4Prepare`."""
        chosen = host_array("local_topk", local_topk)
        rows = csa_translate(self._out, self._out.block_table, chosen)
        self._csa[: len(rows)] = rows
        return self._csa_view


def _rolled_back(ctx: Integers, q: Integers, rollback: Integers) -> Integers:
    """Contexts of the active rows less the tokens that were rejected before the step."""
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
    """What stages and expands steps in a place."""
    if allocate is None and place == "numpy":
        return HostSteps(cfg, table, lambda array: array)
    if allocate is None and place == "cpu":
        if find_spec("paddle") is None:
            raise BackendUnavailable(
                "place: 'cpu' needs Paddle, which is not installed; install fd_dsa[cpu], or take "
                "place='numpy'"
            )
        return HostSteps(cfg, table, as_tensor)
    # the launcher is loaded only where a device is asked for
    from fd_dsa.device.allocation import paddle_allocator
    from fd_dsa.v4_prepare.launch import DeviceSteps

    return DeviceSteps(cfg, allocate or paddle_allocator(place), table, NUM_SLABS)
