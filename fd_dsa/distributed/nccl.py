"""NCCL through ctypes: the library that the process has loaded, or an installed one."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fd_dsa.commands import pip_command
from fd_dsa.environment import set_default
from fd_dsa.errors import BackendUnavailable, DeviceError, DtypeError
from fd_dsa.triton_runtime.compile_ahead import MODE
from fd_dsa.triton_runtime.driver import cuda

UNIQUE_ID_BYTES = 128
_SONAME = "libnccl.so.2"
_UINT8, _SUM = 1, 0
_TYPES = {"uint8": _UINT8, "int32": 2, "int64": 4, "float16": 6, "float32": 7, "bfloat16": 9}


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_ubyte * UNIQUE_ID_BYTES),)


def new_unique_id() -> bytes:
    """Make the id of a communicator, in one process for all its ranks.

    Raises:
        BackendUnavailable: no NCCL is found.
        DeviceError: NCCL finds no network interface to listen on.
    """
    made = _UniqueId()
    _check(load_library().ncclGetUniqueId(ctypes.byref(made)), "ncclGetUniqueId")
    return bytes(made.internal)


class Communicator:
    """Collectives of the processes with one `new_unique_id`, each with its own GPU.

    The caller allows one thread at a time.

    Raises:
        BackendUnavailable: see `new_unique_id`.
        DeviceError: see `new_unique_id`; or two ranks have the same GPU.
    """

    def __init__(self, rank: int, size: int, unique_id: bytes, device: int) -> None:
        self._handle, self._device, self._size = ctypes.c_void_p(), device, size
        arguments = ctypes.c_int(size), _UniqueId.from_buffer_copy(unique_id), ctypes.c_int(rank)
        with cuda().context(device):
            code = load_library().ncclCommInitRank(ctypes.byref(self._handle), *arguments)
        _check(code, f"ncclCommInitRank of rank {rank} of {size}")

    def all_reduce(self, at: int, count: int, dtype: str, stream: ctypes.c_void_p) -> None:
        """Enqueue the sum of `count` values over all ranks, in place.

        Raises:
            DtypeError: NCCL has no such type.
        """
        self._sum("ncclAllReduce", at, at, count, dtype, stream)

    def reduce_scatter(
        self, source: int, target: int, count: int, dtype: str, stream: ctypes.c_void_p
    ) -> None:
        """Enqueue sums over all ranks, of which each rank gets `count` values, in their order.

        Raises:
            DtypeError: NCCL has no such type.
        """
        self._sum("ncclReduceScatter", source, target, count, dtype, stream)

    def all_gather(self, source: int, target: int, num_bytes: int, stream: ctypes.c_void_p) -> None:
        """Enqueue a copy of `num_bytes` of every rank to `target`, in the order of ranks."""
        places, kind = (ctypes.c_void_p(source), ctypes.c_void_p(target)), ctypes.c_int(_UINT8)
        self._call("ncclAllGather", *places, ctypes.c_size_t(num_bytes), kind, stream)

    def broadcast(self, parts: Sequence[tuple[int, int]], stream: ctypes.c_void_p) -> None:
        """Enqueue one operation that copies parts of each rank to all others, in place.

        Args:
            parts: address and number of bytes of each part. Part i is that of the rank i modulo the
                number of ranks.
        """
        with self._one_operation():
            for index, (at, num_bytes) in enumerate(parts):
                if num_bytes:
                    rank = index % self._size
                    place, count = ctypes.c_void_p(at), ctypes.c_size_t(num_bytes)
                    self._call("ncclBroadcast", place, place, count, _UINT8, rank, stream)

    def exchange(
        self,
        sent: Sequence[tuple[int, int]],
        received: Sequence[tuple[int, int]],
        stream: ctypes.c_void_p,
    ) -> None:
        """Enqueue one operation that sends a part to each rank and receives one from each.

        Args:
            sent, received: address and number of bytes of the part of each rank.
        """
        with self._one_operation():
            for name, parts in (("ncclSend", sent), ("ncclRecv", received)):
                for rank, (at, num_bytes) in enumerate(parts):
                    if num_bytes:
                        place, count = ctypes.c_void_p(at), ctypes.c_size_t(num_bytes)
                        self._call(name, place, count, _UINT8, rank, stream)

    def destroy(self) -> None:
        """Free everything after all collectives have ended. A second call has no effect."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle.value:
            with cuda().context(self._device):
                load_library().ncclCommDestroy(handle)

    def _sum(
        self, name: str, source: int, target: int, count: int, dtype: str, stream: ctypes.c_void_p
    ) -> None:
        """Enqueue a collective that adds."""
        if dtype not in _TYPES:
            raise DtypeError(f"{name}: got {dtype}, allowed are {', '.join(_TYPES)}")
        places = ctypes.c_void_p(source), ctypes.c_void_p(target)
        kind = ctypes.c_int(_TYPES[dtype])
        self._call(name, *places, ctypes.c_size_t(count), kind, _SUM, stream)

    @contextmanager
    def _one_operation(self) -> Iterator[None]:
        """Enqueue the calls inside as one operation."""
        library = load_library()
        with cuda().context(self._device):
            _check(library.ncclGroupStart(), "ncclGroupStart")
            try:
                yield
            finally:
                code = library.ncclGroupEnd()
        _check(code, "ncclGroupEnd")

    def _call(self, name: str, *arguments: object) -> None:
        """Enqueue a collective on the stream, which is the last argument."""
        if MODE.ahead is not None:
            # the other ranks do not take part
            return
        *values, stream = arguments
        with cuda().context(self._device):
            code = getattr(load_library(), name)(*values, self._handle, stream)
        _check(code, name)


def _check(code: int, what: str) -> None:
    """Raise DeviceError with NCCL's text if it returned an error."""
    if code:
        library, texts = load_library(), []
        library.ncclGetErrorString.restype = library.ncclGetLastError.restype = ctypes.c_char_p
        for text in (library.ncclGetErrorString(code), library.ncclGetLastError(None)):
            texts += [text.decode().strip()] if text and text.strip() else []
        raise DeviceError(f"{what}: NCCL error {code}: {'; '.join(texts)}")


@cache
def load_library() -> ctypes.CDLL:
    """Return the library that the process has loaded, or else an installed one."""
    # no NVLink multicast, because not every machine grants it
    set_default("NCCL_NVLS_ENABLE", "0")
    for path in library_paths(Path("/proc/self/maps").read_text()):
        with suppress(OSError):
            return ctypes.CDLL(path)
    raise BackendUnavailable(
        f"NCCL: found no {_SONAME}, which ranks on several GPUs need; install it: "
        f"{pip_command('nvidia-nccl-cu12')} (for CUDA 13 nvidia-nccl-cu13)"
    )


def library_paths(maps: str) -> Iterator[str]:
    """Yield the places of NCCL: in the process, by its maps, then pip's and the system's."""
    yield from re.findall(r"\s(/\S*libnccl\.so\S*)$", maps, re.MULTILINE)[:1]
    spec = find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield f"{folder}/nccl/lib/{_SONAME}"
    yield _SONAME
