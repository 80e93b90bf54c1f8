"""Steps of DeepSeek-V4: staged ahead by the host, expanded where the layers run."""

from __future__ import annotations

from collections import deque
from typing import Any, NoReturn, Protocol

import numpy as np

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.buffers import (
    HOST_PLACES,
    Allocate,
    Array,
    V4Buffers,
    device_allocator,
    host_view,
)
from fd_dsa.v4_prepare.checks import (
    RowChecks,
    StepInputs,
    raise_first_fault,
    rows_have_room,
    step_inputs,
)
from fd_dsa.v4_prepare.config import V4PrepareConfig
from fd_dsa.v4_prepare.fixed_lists import FusedList, HostLists, Kind, check_topk
from fd_dsa.v4_prepare.host_prepare import HostSteps
from fd_dsa.v4_prepare.slab import ERROR_SLOTS, FAULT_ROLLBACK, MAX_STAMP, SlabLayout
from fd_dsa.v4_prepare.steady import SteadyCheck
from fd_dsa.v4_prepare.table import UNCHANGED, Int32Array, TableChange, TableMirror
from fd_dsa.v4_prepare.words import StepWords

NUM_SLABS = 3
"""Steps that may be staged and not yet expanded."""

_STAMP = 4
_NO_FAULTS = bytes(4 * ERROR_SLOTS)


class _Steps(Protocol):
    """What moves slabs and expands them in one place."""

    # int32 [ERROR_SLOTS, ERROR_WORDS], host memory
    faults: Int32Array

    def next_slab(self) -> Int32Array: ...
    def upload(self, num_words: int) -> int: ...
    def expand(self, slab: int, rollback: Array | None) -> None: ...
    def is_done(self, slab: int) -> bool: ...


class _Lists(Protocol):
    """What derives lists from the outputs in one place."""

    def csa_translate(self, local_topk: Array) -> Array: ...
    def fused_list(self, kind: Kind, csa_rows: Array | None) -> FusedList: ...


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

    Raises:
        BackendUnavailable: no library serves the place.

    Not thread-safe: one object serves one stream of steps.
    """

    def __init__(
        self, cfg: V4PrepareConfig, place: str = "cpu", allocate: Allocate | None = None
    ) -> None:
        self.cfg, self.place = cfg, place
        if allocate is None and place not in HOST_PLACES:
            allocate = device_allocator(place)
        self.buffers = V4Buffers(cfg, place, allocate)
        self._checks = RowChecks(cfg)
        self._table = TableMirror(cfg)
        self._steady = SteadyCheck(cfg, self._table)
        self._words = StepWords(SlabLayout(cfg))
        self._steps, self._lists = _parts_for(cfg, place, self.buffers, allocate)
        self._fault_stamps = self._steps.faults[:, _STAMP]
        self._stamp = 0
        # stamp, slab and tokens of steps to be expanded, and of those that may still be running
        self._staged: deque[tuple[int, int, int]] = deque()
        self._running: deque[tuple[int, int, int]] = deque(maxlen=2 * NUM_SLABS)
        self.stage([], [], [])
        self.expand()

    def set_blocks(self, row: int, block_ids: Any, start: int = 0) -> None:
        """Say which blocks a row has from column `start` on, from the next step with it on.

        As `blocks[start:] = block_ids` does for a list: the row has no block behind them. A new
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
        self._table.set_blocks(row, block_ids, start)

    def append_blocks(self, rows: Any, block_ids: Any) -> None:
        """Say that each of some rows has one more block, from the next step with it on.

        As `set_blocks(row, [id], n)` for each of the rows, n the number of blocks that it has: what
        decoding rows need when they reach the ends of their blocks. One call for all of them costs
        about as much as one of `set_blocks`.

        Args:
            rows: [n] integers, rows of the steps, all different.
            block_ids: [n] integers in [0, num_blocks).

        Raises:
            ValueError: no such row, or one twice.
            V4PrepareError: E_DTYPE or E_SHAPE; E_TABLE or E_BLOCK of the first row at fault. All
                rows are as they were.
        """
        self._table.append_blocks(rows, block_ids)

    def stage(self, ctx: Any, q: Any, slot: Any, block_table: Any = None) -> None:
        """Check the next step and queue its copy; the device is not waited for.

        A step that is refused changes nothing. The arrays may be changed after the call.

        Args:
            ctx: [B] integers; tokens of each row after this step, all drafts of the step before
                counted as kept where `expand` gets a rollback.
            q: [B]; tokens of each row in this step, 0 = idle.
            slot: [B]; state slot of each row, no two active rows alike.
            block_table: [B, columns]; physical blocks. The first ceil(ctx / block_size) cells of
                an active row are its blocks from now on. None = what `set_blocks` and the steps
                before said: then the cost does not grow with ctx.

        Raises:
            V4PrepareError: the first fault, in the order E_SHAPE, E_DTYPE, E_BATCH; E_QLEN, E_CTX,
                E_SLOT, E_TABLE, E_BLOCK row by row; E_TOKENS.
            RuntimeError: three steps are staged and not expanded, or a graph is being captured.

        Cost: a fixed number of NumPy calls, one copy; nothing that grows with ctx is allocated. A
        step whose q and slot are int32 arrays equal to those of the last one is checked in a few
        microseconds.
        """
        if len(self._staged) == NUM_SLABS:
            raise RuntimeError(
                f"stage: {NUM_SLABS} steps are staged and not expanded, no slab is free; "
                "call expand() first"
            )
        if block_table is None and self._steady.is_good(ctx, q, slot):
            slab = self._steps.next_slab()
        else:
            inputs = self._inputs(ctx, q, slot, block_table)
            num_tokens, change = self._check(inputs, block_table is not None)
            # refuses in a capture, so before anything is written
            slab = self._steps.next_slab()
            if change is not UNCHANGED:
                self._table.apply(change)
            ctx, q, slot, _ = inputs
            self._words.take_rows(q, slot, num_tokens)
            self._steady.remember(q, slot)
        stamp = self._stamp % MAX_STAMP + 1
        num_words = self._words.write(slab, stamp, ctx, self._table)
        self._staged.append((stamp, self._steps.upload(num_words), self._words.num_tokens))
        if self._table.has_news:
            self._table.mark_sent(len(ctx))
        self._stamp = stamp

    def expand(self, rollback: Array | None = None) -> V4Buffers:
        """Queue the launch that writes the outputs of the earliest staged step.

        On the current stream: work queued behind it reads the outputs of this step, and work
        queued before it those of the step before. Not to be captured; a graph of layers reads the
        buffers, which never move.

        Args:
            rollback: int32 [n] in the memory of the buffers, or None; tokens of rows 0..n-1 that
                the step before drafted and the sampler rejected. An active row has `ctx -
                rollback` tokens; rows from n on have ctx. Where that cannot be (rollback < 0 or
                ctx - rollback < q), the tokens of the row become padding, and `poll_error` raises.

        Returns:
            The buffers, always the same.

        Raises:
            RuntimeError: no step is staged.
            DtypeError, LaunchError: the rollback is not int32 or lies elsewhere; the step is still
                staged.
        """
        if not self._staged:
            raise RuntimeError("expand: no step is staged; call stage() first")
        step = self._staged[0]
        self._steps.expand(step[1], rollback)
        self._running.append(self._staged.popleft())
        return self.buffers

    def poll_error(self) -> None:
        """Raise the earliest error that only the device could see, if its step has run; once.

        Called once a step, it raises one step later. Nothing is waited for. The last error of
        every sixteenth step is kept until it is raised.

        Raises:
            V4PrepareError: E_CTX of the lowest row at fault, with the text of the host's check.
        """
        if self._fault_stamps.tobytes() == _NO_FAULTS:
            return
        # a word may be seen before the others of its step
        running = {stamp for stamp, slab, _ in self._running if not self._steps.is_done(slab)}
        for stamp, at in sorted(zip(self._fault_stamps.tolist(), range(ERROR_SLOTS), strict=True)):
            if stamp and stamp not in running:
                words = self._steps.faults[at].tolist()
                self._steps.faults[at] = 0
                _raise_fault(words)

    def csa_translate(self, local_topk: Array) -> Array:
        """Rows of the CSA entries that the indexer chose for the tokens of the expanded step.

        Queued like `expand`, once for each layer that chooses; layers that share its choice read
        the same list. The call may be captured in a graph, but not the first one, which makes the
        list.

        Args:
            local_topk: int32 [T or more, index_topk] in the memory of the buffers, contiguous;
                entry numbers, of which the first min(csa_visible, index_topk) of a token are read.

        Returns:
            int32 [capacity], always the same: token t's rows lie from csa_indptr[t] to
            csa_indptr[t + 1], -1 where a number is no entry that t sees.

        Raises:
            ShapeError: `local_topk` has another shape.
        """
        check_topk(self.cfg, local_topk, self._running[-1][2])
        return self._lists.csa_translate(local_topk)

    def fused_list(self, kind: Kind, csa_rows: Array | None = None) -> FusedList:
        """One list a token of the expanded step: compressed rows first, window rows last.

        Queued like `expand`; the first call with and without rows must not be captured.

        Args:
            kind: "swa" = window only, "csa" or "hca" = with the entries of that kind.
            csa_rows: what `csa_translate` returned, for kind "csa"; None = -1 in their places.

        Returns:
            (indptr, rows), always the same for a kind.

        Raises:
            ValueError: an unknown kind, "hca" in table mode, or rows given for another kind.
            V4PrepareError: E_INDPTR, the lists together could exceed int32.
        """
        if csa_rows is not None and kind != "csa":
            raise ValueError(
                f"csa_rows: got rows for kind {kind!r}, only 'csa' has them; pass None"
            )
        return self._lists.fused_list(kind, csa_rows)

    def _inputs(self, ctx: Any, q: Any, slot: Any, block_table: Any) -> StepInputs:
        """The inputs as arrays; a table of no columns where none is given.

        Raises:
            V4PrepareError: E_SHAPE, E_DTYPE or E_BATCH.
        """
        if block_table is None:
            block_table = np.empty((np.shape(ctx)[:1] or (0,)) + (0,), np.int32)
        return step_inputs(self.cfg, ctx, q, slot, block_table)

    def _check(self, inputs: StepInputs, has_table: bool) -> tuple[int, TableChange]:
        """Tokens of a good step, and what its block table changes."""
        ctx, q, slot, table = inputs
        num_tokens = self._checks.num_tokens(ctx, q, slot)
        if not has_table:
            if num_tokens >= 0 and rows_have_room(ctx, q, self._table.room(len(ctx))):
                return num_tokens, UNCHANGED
            table = self._table.table_of(len(ctx))
        elif num_tokens >= 0:
            change = self._table.compare(table, ctx, q)
            if change is not None:
                return num_tokens, change
        raise_first_fault(self.cfg, StepInputs(ctx, q, slot, table))


def _parts_for(
    cfg: V4PrepareConfig, place: str, buffers: V4Buffers, allocate: Allocate | None
) -> tuple[_Steps, _Lists]:
    """What serves the place of the buffers."""
    layout = SlabLayout(cfg)
    if buffers.host is not None:
        host = HostSteps(cfg, layout, buffers.host, NUM_SLABS)
        return host, HostLists(host.out, buffers.host["block_table"], host_view(place))
    from fd_dsa.v4_prepare.device_lists import DeviceLists
    from fd_dsa.v4_prepare.device_prepare import DeviceSteps

    assert allocate is not None
    device = DeviceSteps(cfg, layout, buffers, allocate, NUM_SLABS)
    return device, DeviceLists(cfg, buffers, allocate)


def _raise_fault(words: list[int]) -> NoReturn:
    """The error of a row's fault, in the words of the host's checks."""
    fault, row, found, limit = words[:4]
    text = f"rollback={found} < 0" if fault == FAULT_ROLLBACK else f"ctx={found} < q={limit}"
    raise V4PrepareError("E_CTX", row, text)
