"""All-reduce of a few rows by the CUDA kernel of custom_ops/, over memory that ranks share."""

from __future__ import annotations

import ctypes
from math import prod

import numpy as np

from fd_dsa.device.transfers import Transfers
from fd_dsa.environment import launches_overlap
from fd_dsa.errors import DeviceError
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.library_kernel import LibraryKernel
from fd_dsa.tensor import Tensor

SIZES = (2, 4, 8)
"""Numbers of ranks that the kernel is made for."""
MOST_BYTES = 2 << 20
"""Of rows that the kernel sums; more bytes are NCCL's."""
_VALUES, _STATE_BYTES = 8, 256
_HANDLE_BYTES, _LAZY_PEER_ACCESS = 64, 1
_ADDRESSES = ("x", "out", "late")
_NUMBERS = ("rank", "size", "num_vectors", "slot_vectors", "max_blocks", "starts_early")


class Job(ctypes.Structure):
    """FdDsaAllReduce of custom_ops/csrc/all_reduce.h, which says what each field is."""

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
    """Memory of a rank on its device, and that of the others as this process sees it.

    It stays until the process ends: other ranks may have it mapped for longer than this one.

    Attributes:
        handle: uint8 [64], what another process opens it with.
    """

    def __init__(self, transfers: Transfers, num_bytes: int) -> None:
        self._function, own, handle = transfers.function, ctypes.c_uint64(), _Handle()
        # not of a pool, whose pieces have no handle of their own
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
        """Addresses of all ranks' memory, of their handles uint8 [size, 64].

        Raises:
            DeviceError: a device cannot read another one's memory.
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
        """Forget the others' memory; may be called twice."""
        while self._mapped:
            self._function("cuIpcCloseMemHandle")(self._mapped.pop())


class PeerAllReduce(LibraryKernel):
    """The kernel, for one rank; one thread at a time.

    Args:
        late: uint32 [1] in page-locked memory, where a launch that gives up leaves the number of a
            rank that did not come, plus one.
        timeout_s: how long a launch waits for the others.

    Raises:
        BackendUnavailable: the library is of another release.
    """

    launcher, size, structure = "fd_dsa_all_reduce_cuda", "fd_dsa_all_reduce_bytes", Job

    def __init__(
        self, kernels: ctypes.CDLL, rank: int, size: int, late: np.ndarray, timeout_s: float
    ) -> None:
        super().__init__(kernels)
        job = self.job
        job.rank, job.size, job.slot_vectors = rank, size, MOST_BYTES // (2 * _VALUES)
        job.late, job.timeout_ns = late.ctypes.data, int(timeout_s * 1e9)
        job.starts_early = launches_overlap()
        self._late = late
        memory = kernels.fd_dsa_all_reduce_memory
        memory.restype = ctypes.c_int64
        self.memory_bytes = memory(size, job.slot_vectors)

    def use(self, addresses: list[int], max_blocks: int = 0) -> None:
        """Take the memory of the ranks, and at most so many blocks; 0: as the device has room."""
        self.job.ranks[: len(addresses)] = addresses
        self.job.max_blocks = max_blocks

    @staticmethod
    def suits(tensor: Tensor) -> bool:
        """Whether the kernel sums such tensors."""
        num_values = prod(tensor.shape)
        return (
            dtype_name(tensor.dtype) == "bfloat16"
            and 0 < 2 * num_values <= MOST_BYTES
            and num_values % _VALUES == 0
        )

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Fill `out`, which may be `x`, with the sum.

        Args:
            x: of which `suits`.

        Raises:
            LaunchError: a tensor is not contiguous, or not on the device of the others.
            DeviceError: the CUDA runtime refuses the launch, or earlier work has failed.

        Cost: one launch; no allocation, no wait of the host.
        """
        job = self.job
        self.bind(x)
        job.x, job.out = (self._address(n, t, multiple=16) for n, t in (("x", x), ("out", out)))
        job.num_vectors = prod(x.shape) // _VALUES
        try:
            self.launch()
        except DeviceError as error:
            raise DeviceError(self.failure() or str(error)) from error

    def failure(self) -> str:
        """Which rank a launch has given up to wait for, in words; "" if none."""
        rank, seconds = int(self._late[0]) - 1, self.job.timeout_ns / 1e9
        return "" if rank < 0 else f"rank {rank} did not come to an all-reduce for {seconds:g} s"
