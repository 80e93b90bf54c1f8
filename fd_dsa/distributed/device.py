"""Group of processes with a GPU each, on one machine.

NCCL runs the collectives, except for the sums of a decode step. These are a few hundred kilobytes,
so NCCL's latency is their cost. A CUDA kernel of the package sums them over memory that the ranks
share.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from fd_dsa import custom_ops
from fd_dsa.device.allocation import Allocate
from fd_dsa.device.transfers import on_host, transfers_for, uploaded
from fd_dsa.distributed.group import Group
from fd_dsa.distributed.nccl import Communicator
from fd_dsa.distributed.shared_memory import SIZES, PeerAllReduce, SharedMemory
from fd_dsa.environment import exchanged_min_tokens
from fd_dsa.errors import BackendUnavailable, DeviceError
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.library_kernel import interpreter_refusal
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.driver import cuda

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""Time that a launch waits for other ranks, which may compile kernels before their own launch."""


class DeviceGroup(Group):
    """Ranks of one machine. Every rank constructs its group at the same time.

    Args:
        unique_id: result of `nccl.new_unique_id`, the same on all ranks.
        allocate: allocator of tensors on this rank's device.
        timeout_s: seconds that the package's all-reduce waits for other ranks on the device. Then
            it ends the work of this process on the device, and `failure` names the missing rank.

    Raises:
        BackendUnavailable, DeviceError: see `Communicator`.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        unique_id: bytes,
        allocate: Allocate,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.rank, self.size, self._allocate = rank, size, allocate
        self._mark: Any = allocate((1,), "uint8")
        self._transfers = transfers_for(self._mark)
        self._nccl = Communicator(rank, size, unique_id, self._transfers.device)
        self._memory: SharedMemory | None = None
        # the driver allocates in the context of the thread
        with cuda().context(self._transfers.device):
            self._peers, reason = self._share_memory(timeout_s)
        served = f"NCCL ({reason})" if reason else "custom_op, more bytes by NCCL"
        logger.info("all-reduce of a decode step among %d GPUs: %s", size, served)
        self.gathers_rows = self._try_rows()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum in place, see `Group`. NCCL adds in its own order, the same at every call."""
        if self._peers is not None and self._peers.suits(tensor):
            self._peers(tensor, tensor)
        elif prod(tensor.shape):
            address, dtype = int(tensor.data_ptr()), dtype_name(tensor.dtype)
            self._nccl.all_reduce(address, prod(tensor.shape), dtype, self._transfers.stream())
        return tensor

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum by NCCL into new memory, see `Group`."""
        count, dtype = tensor.shape[0] // self.size, dtype_name(tensor.dtype)
        out = self._allocate((count, *tensor.shape[1:]), dtype)
        if prod(out.shape):
            places = int(tensor.data_ptr()), int(out.data_ptr())
            self._nccl.reduce_scatter(*places, prod(out.shape), dtype, self._transfers.stream())
        return out

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gather by NCCL, see `Group`."""
        out = self._allocate((self.size, *tensor.shape), dtype_name(tensor.dtype))
        num_bytes = prod(tensor.shape) * tensor.element_size()
        if num_bytes:
            places = int(tensor.data_ptr()), int(out.data_ptr())
            self._nccl.all_gather(*places, num_bytes, self._transfers.stream())
        return out

    def all_gather_rows(self, rows: Tensor, bounds: Sequence[int]) -> None:
        """Gather by broadcasts of NCCL, see `Group`."""
        parts = [_place(rows, begin, end) for begin, end in pairwise(bounds)]
        self._nccl.broadcast(parts, self._transfers.stream())

    def all_gather_tensors(self, tensors: Sequence[Tensor], begin: int, end: int) -> None:
        """Gather by one group of broadcasts, see `Group`."""
        parts = [_place(rows, begin, end) for rows in tensors]
        self._nccl.broadcast(parts, self._transfers.stream())

    def exchange_rows(
        self, source: Any, source_bounds: Sequence[int], target: Any, target_bounds: Sequence[int]
    ) -> None:
        """Exchange by one group of NCCL's sends and receives, see `Group`."""
        sent = [_place(source, begin, end) for begin, end in pairwise(source_bounds)]
        received = [_place(target, begin, end) for begin, end in pairwise(target_bounds)]
        self._nccl.exchange(sent, received, self._transfers.stream())

    def barrier(self) -> None:
        """Block the host, see `Group`, and wait for the enqueued work of this rank."""
        self.all_gather(self._mark)
        self._transfers.finish()

    def failure(self) -> str:
        """Return the rank that an all-reduce waited for in vain, or "" without a failure."""
        return "" if self._peers is None else self._peers.failure()

    def close(self) -> None:
        """Free what the group holds, after the enqueued work of this rank.

        The call blocks while a captured graph holds collectives of the group.
        """
        if self._memory is not None:
            self._transfers.finish()
            self._memory.close()
        self._peers = self._memory = None
        self._nccl.destroy()

    def _share_memory(self, timeout_s: float) -> tuple[PeerAllReduce | None, str]:
        """Make the package's all-reduce, if every rank can run it.

        Returns:
            The all-reduce and "", or None and the reason of this rank.
        """
        kernel, reason, handle = None, "", np.zeros(64, np.uint8)
        kernels, late = custom_ops.build().kernels, self._transfers.host_buffer(4).view(np.uint32)
        try:
            if self.size not in SIZES:
                raise BackendUnavailable(f"it supports {', '.join(map(str, SIZES))} GPUs")
            if kernels is None or interpreter_refusal():
                state = f"{custom_ops.PACKAGE} is {custom_ops.build().state}"
                raise BackendUnavailable(interpreter_refusal() or state)
            kernel = PeerAllReduce(kernels, self.rank, self.size, late, timeout_s)
            self._memory = SharedMemory(self._transfers, kernel.memory_bytes)
            handle = self._memory.handle
        except (BackendUnavailable, DeviceError) as error:
            reason = str(error)
        # every rank joins both exchanges, otherwise the other ranks would wait
        handles = self._exchange(handle)
        if not handles.any(axis=1).all():
            return None, reason or "another rank cannot share memory"
        assert kernel is not None and self._memory is not None
        try:
            kernel.use(self._memory.open(handles, self.rank))
        except DeviceError as error:
            reason = f"no peer access: {error}"
        if not self._exchange(np.array([not reason], np.uint8)).all():
            return None, reason or "another rank has no peer access"
        return kernel, ""

    def _try_rows(self) -> bool:
        """Gather a row of every rank, and return True if it arrives on all ranks.

        Ranks that are to exchange rows do so as well.
        """
        wanted, reason = np.arange(1, self.size + 1, dtype=np.uint8), ""
        own, none = np.full_like(wanted, self.rank + 1), np.zeros_like(wanted)
        gathered, sent, received = (
            uploaded(self._allocate, one) for one in (wanted * (wanted == own), own, none)
        )
        bounds, tried = range(self.size + 1), [gathered]
        try:
            self.all_gather_rows(gathered, bounds)
            if exchanged_min_tokens():
                self.exchange_rows(sent, bounds, received, bounds)
                tried.append(received)
            if any((on_host(tensor, none) != wanted).any() for tensor in tried):
                reason = "the rows of another rank do not arrive"
        except DeviceError as error:
            reason = str(error)
        if self._exchange(np.array([not reason], np.uint8)).all():
            return True
        logger.warning("gather of rows: unavailable (%s)", reason or "another rank cannot")
        return False

    def _exchange(self, values: np.ndarray) -> np.ndarray:
        """Return the uint8 values of all ranks, in host memory."""
        gathered = self.all_gather(uploaded(self._allocate, values))
        return on_host(gathered, np.empty((self.size, *values.shape), np.uint8))


def _place(rows: Tensor, begin: int, end: int) -> tuple[int, int]:
    """Return the address and the number of bytes of consecutive rows."""
    row_bytes = prod(rows.shape[1:]) * rows.element_size()
    return int(rows.data_ptr()) + begin * row_bytes, (end - begin) * row_bytes
