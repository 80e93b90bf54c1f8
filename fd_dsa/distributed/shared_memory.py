"""All-reduce of a few rows by the CUDA kernel of custom_ops/, over memory that ranks share."""

from __future__ import annotations

import ctypes
from math import prod

import numpy as np

from fd_dsa.device.transfers import Transfers
from fd_dsa.errors import DeviceError
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.library_kernel import LibraryKernel
from fd_dsa.tensor import Tensor

SIZES = (2, 4, 8)
"""Numbers of ranks that the kernel supports."""
MAX_BYTES = 2 << 20
"""Bytes of the largest tensor that the kernel sums. NCCL sums larger ones."""
_VALUES, _STATE_BYTES = 8, 256
_HANDLE_BYTES, _LAZY_PEER_ACCESS = 64, 1
_ADDRESSES = ("x", "out", "late")
_NUMBERS = ("rank", "size", "num_vectors", "slot_vectors", "max_blocks", "starts_early")


class Job(ctypes.Structure):
    """FdDsaAllReduce of custom_ops/csrc/all_reduce.h, which describes the fields."""

    _fields_ = (
        ("ranks", ctypes.c_void_p * 8),
        *((n, ctypes.c_void_p) for n in _ADDRESSES),
        ("timeout_ns", ctypes.c_uint64),
        *((n, ctypes.c_int32) for n in _NUMBERS),
    )


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


class SharedMemory:
    """Memory of a rank on its device, and this process's mappings of the other ranks' memory.

    The memory stays until the process ends, because other ranks may keep it mapped for longer.

    Attributes:
        handle: uint8 [64], with which another process maps this rank's memory.
    """

    def __init__(self, transfers: Transfers, num_bytes: int) -> None:
        self._function, own, handle = transfers.function, ctypes.c_uint64(), _Handle()
        # not from a pool, because its pieces have no handles
        self._function("cuMemAlloc_v2")(ctypes.byref(own), ctypes.c_size_t(num_bytes))
        self._function("cuIpcGetMemHandle")(ctypes.byref(handle), own)
        fill, stream = self._function("cuMemsetD8Async"), transfers.stream()
        for first, byte, end in ((0, 0, _STATE_BYTES), (_STATE_BYTES, 0xFF, num_bytes)):
            size = ctypes.c_size_t(end - first)
            fill(ctypes.c_uint64(own.value + first), ctypes.c_ubyte(byte), size, stream)
        self.handle = np.frombuffer(memoryview(handle), np.uint8)
        self._own = own.value
        self._mapped: list[ctypes.c_uint64] = []

    def open(self, handles: np.ndarray, rank: int) -> list[int]:
        """Map the memory of all ranks and return its addresses.

        Args:
            handles: uint8 [size, 64], `handle` of each rank.

        Raises:
            DeviceError: a device cannot read the memory of another one.
        """
        addresses = []
        for other, handle in enumerate(handles):
            address = ctypes.c_uint64(self._own)
            if other != rank:
                opened = (
                    _Handle.from_buffer_copy(handle.tobytes()),
                    ctypes.c_uint(_LAZY_PEER_ACCESS),
                )
                self._function("cuIpcOpenMemHandle_v2")(ctypes.byref(address), *opened)
                self._mapped.append(address)
            addresses.append(address.value)
        return addresses

    def close(self) -> None:
        """Unmap the other ranks' memory. A second call has no effect."""
        while self._mapped:
            self._function("cuIpcCloseMemHandle")(self._mapped.pop())


class PeerAllReduce(LibraryKernel):
    """All-reduce kernel of one rank.

    The caller allows one thread at a time.

    Args:
        late: uint32 [1] in page-locked memory. A launch that times out writes the number of a
            missing rank, plus one.
        timeout_s: seconds that a launch waits for other ranks.

    Raises:
        BackendUnavailable: the library belongs to another release.
    """

    launcher, size, structure = "fd_dsa_all_reduce_cuda", "fd_dsa_all_reduce_bytes", Job

    def __init__(
        self, kernels: ctypes.CDLL, rank: int, size: int, late: np.ndarray, timeout_s: float
    ) -> None:
        super().__init__(kernels)
        job = self.job
        job.rank, job.size, job.slot_vectors = rank, size, MAX_BYTES // (2 * _VALUES)
        job.late, job.timeout_ns = late.ctypes.data, int(timeout_s * 1e9)
        self._late = late
        memory = kernels.fd_dsa_all_reduce_memory
        memory.restype = ctypes.c_int64
        self.memory_bytes = memory(size, job.slot_vectors)

    def use(self, addresses: list[int], max_blocks: int = 0) -> None:
        """Set the memory of the ranks and the largest grid.

        Args:
            addresses: address of each rank's memory, see `SharedMemory.open`.
            max_blocks: max thread blocks of a launch; 0 = as many as the device runs at once.
        """
        self.job.ranks[: len(addresses)] = addresses
        self.job.max_blocks = max_blocks

    @staticmethod
    def suits(tensor: Tensor) -> bool:
        """Return True if the kernel can sum a tensor of this dtype and size."""
        num_values = prod(tensor.shape)
        return (
            dtype_name(tensor.dtype) == "bfloat16"
            and 0 < 2 * num_values <= MAX_BYTES
            and num_values % _VALUES == 0
        )

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Fill `out`, which may be `x`, with the sum.

        Args:
            x: tensor for which `suits` is True.

        Raises:
            LaunchError: a tensor is not contiguous, or not on the device of the others.
            DeviceError: the CUDA runtime refuses the launch, or earlier work has failed.

        Cost: one launch; no allocation, no wait of the host.
        """
        job = self.job
        self.bind(x)
        self._set_addresses(16, x=x, out=out)
        job.num_vectors = prod(x.shape) // _VALUES
        try:
            self.launch()
        except DeviceError as error:
            raise DeviceError(self.failure() or str(error)) from error

    def failure(self) -> str:
        """Return the rank that a launch timed out on, or "" without a timeout."""
        rank, seconds = int(self._late[0]) - 1, self.job.timeout_ns / 1e9
        return "" if rank < 0 else f"rank {rank} did not come to an all-reduce for {seconds:g} s"
