"""Inputs of a step on their way to the device while it still computes the step before.

Three sets of slabs take turns, each a page-locked one and one on the device:

    host                         prep_stream                main stream
    next_slab: used[i] done?
      if not: copied[i] done?
    fill the slab
    upload                       if not: wait used[i]
                                 one copy
                                 record copied[i]
    acquire                                                 wait copied[i]
                                                            whatever reads slab i
    release                                                 record used[i]

`prep_stream` waits for nothing of the main stream but the readers of the slab that it overwrites,
which ran three steps ago. So the copy for a step runs beside the work of the step before, and the
calling thread waits for neither.

Why not otherwise: a stream that first waits for the current one, as in ROCm/ATOM #728, starts each
copy when the step before has ended. `paddle.to_tensor` waits for its copy; `Tensor.to` with
`non_blocking` adds a host callback (PaddleFleet #1068). Operators may move page-locked tensors to
the GPU for good (Paddle #78835), so staging memory is no tensor but a NumPy array. Page-locked
memory that is filled again under a copy spoils it (ROCm/ATOM #817, PyTorch #130785).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from fd_dsa.step.checks import Int32Array
from fd_dsa.step.views import CACHED_VIEWS, Allocate
from fd_dsa.triton_runtime.transfers import transfers_for

NUM_SLABS = 3
# int32 values to which the sections of a packed tensor are rounded up: 256 bytes
_SECTION = 64


class InputStaging:
    """Rotating slabs whose copies run on a stream of their own. One thread at a time.

    The order of calls for a step is `next_slab`, `upload`, `acquire`, work that reads the slab,
    `release`; steps may be uploaded ahead, up to `num_slabs`. Cost of all four: about seven calls
    of the driver, no memory, no wait for the device unless the caller is `num_slabs` steps ahead of
    it. Where kernels are interpreted, a copy is done at once.

    Attributes:
        slabs: int32 [num_slabs, num_values] on the device, at one address for life.
        host: int32 [num_values], page-locked; one for each slab.
        used: of each slab, the event after its readers.
        num_waits: how often `next_slab` found its copy unfinished and blocked.
    """

    def __init__(self, allocate: Allocate, num_values: int, num_slabs: int = NUM_SLABS) -> None:
        self.slabs = allocate((num_slabs, num_values), "int32")
        self.transfers = transfers = transfers_for(self.slabs)
        self.num_waits = self._turn = 0
        self.host = [transfers.host_buffer(4 * num_values).view(np.int32) for _ in range(num_slabs)]
        self._stream = transfers.new_stream()
        self._copied = [transfers.event() for _ in range(num_slabs)]
        self.used = [transfers.event() for _ in range(num_slabs)]
        self._is_open = [False] * num_slabs
        # whether the readers of the slab that is filled now were seen to be done
        self._is_read = False
        start = self.slabs.data_ptr()
        self._copies = [
            transfers.copy("h2d", start + 4 * num_values * index, slab.ctypes.data, self._stream)
            for index, slab in enumerate(self.host)
        ]
        for used in self.used:
            # the memory may have been another's, whose work is still queued
            used.record()
        # and may become another's: no copy may arrive after that
        self._stream.finish_before(self)

    def next_slab(self) -> np.ndarray:
        """The page-locked slab to fill for the coming step, the same until `upload`.

        Returns:
            int32 [num_values]; it holds what its last turn left.

        Raises:
            RuntimeError: all slabs are uploaded and not released, or the current stream is being
                captured; every replay would copy this step.
        """
        if self._is_open[self._turn]:
            raise RuntimeError(
                f"input staging: {len(self.used)} steps are uploaded and none is released; read "
                "the earliest one before another is staged"
            )
        # before an event is asked, which would end a capture
        if self.transfers.is_capturing():
            raise RuntimeError(
                "a step of host arrays is built during a graph capture, whose replays would copy "
                "this step again; capture a build from device tensors"
            )
        # readers run after the copy that they read: mostly one question answers two
        self._is_read = self.used[self._turn].done()
        if not self._is_read:
            self.wait_for_copy()
        return self.host[self._turn]

    def wait_for_copy(self) -> None:
        """Block until the last copy of the slab that has its turn is done."""
        copied = self._copied[self._turn]
        if not copied.done():
            self.num_waits += 1
            copied.wait()

    def upload(self, num_values: int) -> int:
        """Queue the copy of the first values of the slab from `next_slab`; its index."""
        index = self._turn
        if not self._is_read:
            self.used[index].precede(self._stream)
        self._copies[index].queue(4 * num_values)
        self._is_open[index], self._is_read = True, False
        self._copied[index].record(self._stream)
        self._turn = (index + 1) % len(self.host)
        return index

    def acquire(self, index: int) -> None:
        """The current stream waits for the copy of a slab; after it the slab may be read."""
        self._copied[index].precede()

    def release(self, index: int) -> None:
        """The readers of a slab are queued on the current stream; after them it may change."""
        self.used[index].record()
        self._is_open[index] = False

    @property
    def prep_stream(self) -> int:
        """Handle of the stream of the copies; 0 where kernels are interpreted."""
        return self._stream.value or 0


class StagedInputs:
    """What the host knows of a step, as sections of one tensor that never moves.

    A copy of an `InputStaging` and one within the device fill it, once a step.

    Args:
        sizes: most int32 values of each section before the block tables.
        max_rows, columns: of the block tables, the last section: a copy ends with the rows in use.

    Attributes:
        tensor: int32, all sections; it changes in stream order.
        staging: the slabs.
    """

    def __init__(
        self, allocate: Allocate, sizes: Sequence[int], max_rows: int, columns: int
    ) -> None:
        ends = np.cumsum([-(-size // _SECTION) * _SECTION for size in sizes]).tolist()
        num_values = ends[-1] + max_rows * columns
        self.tensor = allocate((num_values,), "int32")
        self.staging = InputStaging(allocate, num_values)
        transfers, slabs = self.staging.transfers, self.staging.slabs
        target, start = self.tensor.data_ptr(), slabs.data_ptr()
        self._copies = [
            transfers.copy("d2d", target, start + 4 * num_values * index)
            for index in range(int(slabs.shape[0]))
        ]
        # rows of the tensor's tables that may hold blocks; at first its memory is anything
        self._used_rows = max_rows
        self._starts, self._columns = [0, *ends], columns
        view = partial(section_view, self.tensor, tuple(self._starts), columns)
        self._view = lru_cache(maxsize=CACHED_VIEWS)(view)

    def upload(self, values: Sequence[Int32Array], tables: Int32Array) -> list[Any]:
        """`queue` a step; the tensors that will hold it, valid until the next one.

        Returns:
            int32 tensors, one a section, and the block tables.
        """
        self.queue(values, tables)
        return self.views_of([*map(len, values), len(tables)])

    def queue(self, values: Sequence[Int32Array], tables: Int32Array) -> None:
        """Queue the copies of a step.

        To the device it is copied on the stream of the staging; the current stream waits for that
        and copies it from there to the tensor, after the readers of the step before.

        Args:
            values: integers, at most the size of each section, which zeros fill up.
            tables: int32 [rows, columns]; rows of the step before that this one lacks become -1.
        """
        staging, starts = self.staging, self._starts
        slab = staging.next_slab()
        slab[: starts[-1]] = 0
        for start, array in zip(starts, values, strict=False):
            slab[start : start + len(array)] = array
        rows = len(tables)
        copied = max(rows, self._used_rows)
        end = starts[-1] + copied * self._columns
        packed = slab[starts[-1] : end].reshape(copied, self._columns)
        packed[:rows] = tables
        packed[rows:] = -1
        self._used_rows = rows
        index = staging.upload(end)
        staging.acquire(index)
        self._copies[index].queue(4 * end)
        staging.release(index)

    def views_of(self, sizes: Sequence[int]) -> list[Any]:
        """The first values of each section, and the first block tables; they never move."""
        return [self._view(section, size) for section, size in enumerate(sizes)]


def section_view(
    tensor: Any, starts: tuple[int, ...], columns: int, index: int, length: int
) -> Any:
    """The first values of a section; of the tables, which come last, rows."""
    start = starts[index]
    if index + 1 < len(starts):
        return tensor[start : start + length]
    return tensor[start : start + length * columns].reshape([length, columns])
