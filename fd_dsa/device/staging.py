"""Staging: inputs of a step are copied to the device while it computes the step before.

Three pairs of slabs take turns, each a page-locked slab and a slab on the device:

    host                         prep_stream                main stream
    next_slab: used[i] done?
      if not: copied[i] done?
    fill the slab
    upload                       if not: wait used[i]
                                 one copy
                                 record copied[i]
    acquire                                                 wait copied[i]
                                                            readers of slab i
    release                                                 record used[i]

`prep_stream` waits only for the readers of the slab that it overwrites, which ran three steps ago.
So the copy for a step runs alongside the work of the step before, and the calling thread waits for
neither.

Alternatives that cost more: a stream that first waits for the current one, as in ROCm/ATOM #728,
starts each copy when the step before has ended. `paddle.to_tensor` waits for its copy. `Tensor.to`
with `non_blocking` adds a host callback (PaddleFleet #1068). Operators may move page-locked tensors
to the GPU for good (Paddle #78835), so staging memory is a NumPy array and no tensor. If
page-locked memory is filled again during a copy, the copy is corrupt (ROCm/ATOM #817, PyTorch
#130785).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.device.allocation import CACHED_VIEWS, Allocate
from fd_dsa.device.host_tensor import Int32Array
from fd_dsa.device.transfers import transfers_for
from fd_dsa.tensor import Tensor

NUM_SLABS = 3
Integers = npt.NDArray[np.integer[Any]]
# int32 values to which the sections of a packed tensor are rounded up: 256 bytes
_SECTION = 64


class InputStaging:
    """Rotating slabs with a copy stream of their own. One thread at a time.

    The order of calls for a step is `next_slab`, `upload`, `acquire`, work that reads the slab,
    `release`. Up to `num_slabs` steps may be uploaded ahead. The four calls cost about seven driver
    calls and no memory. They wait for the device only if the caller is `num_slabs` steps ahead of
    it. If kernels are interpreted, a copy is done at once.

    Attributes:
        slabs: int32 [num_slabs, num_values] on the device, at one address for life.
        host: int32 [num_values], page-locked; one for each slab.
        used: one event for each slab, recorded after its readers.
        num_waits: number of calls of `next_slab` that blocked on an unfinished copy.
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
        # True if the readers of the slab that is filled now are known to be done
        self._is_read = False
        start = self.slabs.data_ptr()
        self._copies = [
            transfers.copy("h2d", start + 4 * num_values * index, slab.ctypes.data, self._stream)
            for index, slab in enumerate(self.host)
        ]
        for used in self.used:
            # the allocator may have recycled this memory while earlier work is still enqueued
            used.record()
        # and it may recycle the memory again, so all copies end before
        self._stream.finish_before(self)

    def next_slab(self) -> Int32Array:
        """Return the page-locked slab to fill for the coming step, the same until `upload`.

        Returns:
            int32 [num_values]; it still holds the values of its last turn.

        Raises:
            RuntimeError: all slabs are uploaded and not released, or the current stream is being
                captured; every replay would copy this step.
        """
        if self._is_open[self._turn]:
            raise RuntimeError(
                f"input staging: {len(self.used)} steps are uploaded and none is released; read "
                "the earliest one before another is staged"
            )
        # first, because a query of an event would end a capture
        if self.transfers.is_capturing():
            raise RuntimeError(
                "a step of host arrays is built during a graph capture, whose replays would copy "
                "this step again; capture a build from device tensors"
            )
        # readers run after the copy that they read, so one query usually answers for both
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
        """Enqueue the copy of the first values of the slab, and return the slab's index."""
        index = self._turn
        if not self._is_read:
            self.used[index].precede(self._stream)
        self._copies[index].queue(4 * num_values)
        self._is_open[index], self._is_read = True, False
        self._copied[index].record(self._stream)
        self._turn = (index + 1) % len(self.host)
        return index

    def acquire(self, index: int) -> None:
        """Make the current stream wait for the copy of a slab, so that work may read the slab."""
        self._copied[index].precede()

    def release(self, index: int) -> None:
        """Mark the end of the readers of a slab on the current stream, so that it may change."""
        self.used[index].record()
        self._is_open[index] = False

    @property
    def prep_stream(self) -> int:
        """Handle of the copy stream, 0 if kernels are interpreted."""
        return self._stream.value or 0


class StagedInputs:
    """Host values of a step, as sections of one device tensor that never moves.

    Once a step an `InputStaging` copies the values to the device, and a second copy within the
    device fills the tensor.

    Args:
        sizes: max int32 values of each section before the block tables.
        max_rows, columns: shape of the block tables, the last section. A copy ends with the last
            row in use.

    Attributes:
        tensor: int32, all sections; its values change in stream order.
        staging: slabs of the tensor's values.
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
        # rows of the tensor's tables that may hold blocks: at first all, as its memory is not set
        self._used_rows = max_rows
        self._starts, self._columns = [0, *ends], columns
        view = partial(section_view, self.tensor, tuple(self._starts), columns)
        self._view = lru_cache(maxsize=CACHED_VIEWS)(view)

    def upload(self, values: Sequence[Integers], tables: Int32Array) -> list[Any]:
        """Enqueue the copies of a step (`queue`), and return the tensors that will hold it.

        Returns:
            int32 tensors, one for each section, then the block tables; valid until the next step.
        """
        self.queue(values, tables)
        return self.views_of([*map(len, values), len(tables)])

    def queue(self, values: Sequence[Integers], tables: Int32Array) -> None:
        """Enqueue the copies of a step.

        The copy stream of the staging copies the values to the device. The current stream waits
        for that copy and then fills the tensor, after the readers of the step before.

        Args:
            values: integers, at most the size of each section. Zeros fill the rest of a section.
            tables: int32 [rows, columns]; rows that only the step before had become -1.
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
        """Return the first values of each section and the first block tables, which never move."""
        return [self._view(section, size) for section, size in enumerate(sizes)]


def section_view(
    tensor: Tensor, starts: tuple[int, ...], columns: int, index: int, length: int
) -> Any:
    """Cut the first `length` values of a section, or rows of the block tables, the last section."""
    start = starts[index]
    if index + 1 < len(starts):
        return tensor[start : start + length]
    return tensor[start : start + length * columns].reshape([length, columns])
