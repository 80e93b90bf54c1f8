"""A group of processes with a GPU each, on one machine.

NCCL serves, except for the sums of a decode step: for those few hundred kilobytes its latency is
the cost, and a kernel of our own over memory that the ranks share takes them.
"""

from __future__ import annotations

import logging
from math import prod
from typing import Any

import numpy as np

from fd_dsa import custom_ops
from fd_dsa.device.allocation import Allocate
from fd_dsa.device.transfers import on_host, transfers_for, uploaded
from fd_dsa.distributed.group import Group
from fd_dsa.distributed.nccl import Communicator
from fd_dsa.distributed.shared_memory import SIZES, PeerAllReduce, SharedMemory
from fd_dsa.errors import BackendUnavailable, DeviceError
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.library_kernel import why_not_compiled
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.driver import cuda

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""How long a launch waits for other ranks: longer than one may compile kernels before its own."""


class DeviceGroup(Group):
    """The ranks of a machine; every rank makes it at the same time.

    Args:
        unique_id: of `nccl.new_unique_id`, the same on all ranks.
        allocate: makes tensors on this rank's device.
        timeout_s: how long an all-reduce of our own waits for other ranks on the device. Then it
            ends the work of this process on the device; `failure` says for whom it waited.

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
        # memory is made in the context of the thread
        with cuda().context(self._transfers.device):
            self._peers, reason = self._share_memory(timeout_s)
        served = f"NCCL ({reason})" if reason else "custom_op, more bytes by NCCL"
        logger.info("all-reduce of a decode step among %d GPUs: %s", size, served)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See `Group`; in place. NCCL adds in an order of its own, the same at every call."""
        if self._peers is not None and self._peers.suits(tensor):
            self._peers(tensor, tensor)
        elif prod(tensor.shape):
            address, dtype = int(tensor.data_ptr()), dtype_name(tensor.dtype)
            self._nccl.all_reduce(address, prod(tensor.shape), dtype, self._transfers.stream())
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See `Group`; by NCCL."""
        out = self._allocate((self.size, *tensor.shape), dtype_name(tensor.dtype))
        num_bytes = prod(tensor.shape) * tensor.element_size()
        if num_bytes:
            places = int(tensor.data_ptr()), int(out.data_ptr())
            self._nccl.all_gather(*places, num_bytes, self._transfers.stream())
        return out

    def barrier(self) -> None:
        """See `Group`; waits for the work that this rank has queued, too."""
        self.all_gather(self._mark)
        self._transfers.finish()

    def failure(self) -> str:
        """Why work on the device has failed, where a rank did not come; else ""."""
        return "" if self._peers is None else self._peers.failure()

    def abort(self) -> None:
        """End collectives that wait for a rank that has died; nothing can follow."""
        self._nccl.abort()

    def close(self) -> None:
        """Free what the group holds, after the work that this rank has queued.

        It waits as long as a captured graph with collectives of the group lives.
        """
        if self._memory is not None:
            self._transfers.finish()
            self._memory.close()
        self._peers = self._memory = None
        self._nccl.destroy()

    def _share_memory(self, timeout_s: float) -> tuple[PeerAllReduce | None, str]:
        """Our own all-reduce where every rank can have it; else None, and why this one cannot."""
        kernel, reason, handle = None, "", np.zeros(64, np.uint8)
        kernels, late = custom_ops.build().kernels, self._transfers.host_buffer(4).view(np.uint32)
        try:
            if self.size not in SIZES:
                raise BackendUnavailable(f"it is made for {', '.join(map(str, SIZES))} GPUs")
            if kernels is None or why_not_compiled():
                state = f"{custom_ops.PACKAGE} is {custom_ops.build().state}"
                raise BackendUnavailable(why_not_compiled() or state)
            kernel = PeerAllReduce(kernels, self.rank, self.size, late, timeout_s)
            self._memory = SharedMemory(self._transfers, kernel.memory_bytes)
            handle = self._memory.handle
        except (BackendUnavailable, DeviceError) as error:
            reason = str(error)
        # every rank takes part in both exchanges, whatever it has found
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

    def _exchange(self, values: np.ndarray) -> np.ndarray:
        """The uint8 values of all ranks, in host memory."""
        gathered = self.all_gather(uploaded(self._allocate, values))
        return on_host(gathered, np.empty((self.size, *values.shape), np.uint8))
