"""Ranks with a GPU each, as threads over host memory: the driver and NCCL are fakes.

The CUDA source of the all-reduce runs on emulated threads, those of several ranks at once.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from fd_dsa.distributed import nccl
from fd_dsa.distributed.device import DeviceGroup
from fd_dsa.triton_runtime.driver import cuda
from tests.custom_ops.building import emulated_library
from tests.distributed.sums import sum_of

NO_PEER_ACCESS = 217


class HostIpc:
    """The driver's calls for memory that processes share; a handle has the address.

    Attributes:
        refuse: numbers of the calls that open a handle and fail.
        open_handles: of all ranks.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.refuse: tuple[int, ...] = ()
        self.open_handles, self._opened, self._kept = 0, 0, []
        for name in ("cuMemAlloc_v2", "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2"):
            patch.setattr(cuda().library, name, getattr(self, name), raising=False)
        patch.setattr(cuda().library, "cuIpcCloseMemHandle", self._close, raising=False)
        patch.setattr(cuda().library, "cuMemsetD8Async", self._fill, raising=False)

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        memory = np.full(size.value + 16, 0xA5, np.uint8)
        self._kept.append(memory)
        address._obj.value = -(-memory.ctypes.data // 16) * 16
        return 0

    def cuIpcGetMemHandle(self, handle: Any, address: Any) -> int:
        ctypes.memmove(handle._obj.reserved, ctypes.byref(address), 8)
        return 0

    def cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: Any) -> int:
        self._opened += 1
        if self._opened in self.refuse:
            return NO_PEER_ACCESS
        self.open_handles += 1
        ctypes.memmove(address, handle.reserved, 8)
        return 0

    def _close(self, address: Any) -> int:
        self.open_handles -= 1
        return 0

    def _fill(self, address: Any, value: Any, size: Any, stream: Any) -> int:
        ctypes.memset(address.value, value.value, size.value)
        return 0


class HostNccl:
    """NCCL's calls among threads, with sums of float32 and bfloat16.

    Attributes:
        reduced: number of values of each sum.
        refuses: True if broadcasts fail.
    """

    refuses = False

    def __init__(self, size: int) -> None:
        self._barrier, self._size = threading.Barrier(size, timeout=20), size
        self._sources: dict[int, int] = {}
        # addresses and bytes by sender and receiver, and what a rank receives in its group of calls
        self._sent: dict[tuple[int, int], tuple[int, int]] = {}
        self._received = threading.local()
        self.reduced: list[int] = []
        # functions, so that they take a `restype`
        self.ncclGetErrorString = lambda code: b"unhandled cuda error"
        self.ncclGetLastError = lambda handle: b""

    def ncclCommInitRank(self, handle: Any, size: Any, unique_id: Any, rank: Any) -> int:
        assert (size.value, bytes(unique_id.internal)) == (self._size, b"i" * 128)
        handle._obj.value = rank.value + 1
        return 0

    def ncclAllGather(
        self, source: Any, target: Any, count: Any, kind: int, handle: Any, stream: Any
    ) -> int:
        self._sources[handle.value] = source.value
        self._barrier.wait()
        for rank in range(self._size):
            place = target.value + rank * count.value
            ctypes.memmove(place, self._sources[rank + 1], count.value)
        self._barrier.wait()
        return 0

    def ncclGroupStart(self) -> int:
        self._received.parts = []
        return 0

    def ncclSend(
        self, source: Any, count: Any, kind: int, peer: int, handle: Any, stream: Any
    ) -> int:
        self._sent[handle.value, peer + 1] = source.value, count.value
        return 0

    def ncclRecv(
        self, target: Any, count: Any, kind: int, peer: int, handle: Any, stream: Any
    ) -> int:
        self._received.parts.append((peer + 1, handle.value, target.value, count.value))
        return 0

    def ncclBroadcast(
        self, source: Any, target: Any, count: Any, kind: int, root: int, handle: Any, stream: Any
    ) -> int:
        if self.refuses:
            return 1
        if handle.value == root + 1:
            self._sources[handle.value] = source.value
        self._barrier.wait()
        ctypes.memmove(target.value, self._sources[root + 1], count.value)
        self._barrier.wait()
        return 0

    def ncclGroupEnd(self) -> int:
        if self._received.parts:
            self._barrier.wait()
            for sender, receiver, target, count in self._received.parts:
                source, sent = self._sent.pop((sender, receiver))
                assert sent == count
                ctypes.memmove(target, source, count)
            self._barrier.wait()
        return 0

    def ncclAllReduce(
        self, source: Any, target: Any, count: Any, kind: Any, op: int, handle: Any, stream: Any
    ) -> int:
        total = self._total(source, count.value, kind, handle)
        ctypes.memmove(target.value, total.ctypes.data, total.nbytes)
        self.reduced.append(count.value)
        return 0

    def ncclReduceScatter(
        self, source: Any, target: Any, count: Any, kind: Any, op: int, handle: Any, stream: Any
    ) -> int:
        total = self._total(source, self._size * count.value, kind, handle)
        own = np.split(total, self._size)[handle.value - 1]
        ctypes.memmove(target.value, own.ctypes.data, own.nbytes)
        return 0

    def _total(self, source: Any, count: int, kind: Any, handle: Any) -> np.ndarray:
        as_float = {7: ctypes.c_float, 9: ctypes.c_uint16}[kind.value]
        self._sources[handle.value] = source.value
        self._barrier.wait()
        parts = [
            np.ctypeslib.as_array((as_float * count).from_address(self._sources[rank + 1]))
            for rank in range(self._size)
        ]
        total = sum_of(parts) if kind.value == 9 else np.sum(parts, 0, np.float32)
        self._barrier.wait()
        return total

    def ncclCommDestroy(self, handle: Any) -> int:
        return 0


def empty_on_host(shape: tuple[int, ...], dtype: str) -> Any:
    """An uninitialised Paddle tensor."""
    # GPU tests are collected without it
    import paddle

    return paddle.empty(list(shape), dtype, device=paddle.CPUPlace())


class HostGpus:
    """Makes groups of ranks that are threads.

    Attributes:
        broadcasts: False if the NCCL of the next group refuses them.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ipc, self.nccl, self.broadcasts = HostIpc(patch), HostNccl(1), True
        patch.setattr(nccl, "load_library", lambda: self.nccl)
        patch.setattr("fd_dsa.ops.library_kernel.INTERPRETING", False)
        custom_ops.use_library(emulated_library("all_reduce"))

    def run(
        self, size: int, work: Callable[[DeviceGroup], Any], timeout_s: float = 20
    ) -> list[Any]:
        """Return the results of `work` on all ranks, in their order."""
        self.nccl = HostNccl(size)
        self.nccl.refuses = not self.broadcasts

        def rank_of(rank: int) -> Any:
            group = DeviceGroup(rank, size, b"i" * 128, empty_on_host, timeout_s)
            try:
                return work(group)
            finally:
                group.close()

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(rank_of, range(size)))
