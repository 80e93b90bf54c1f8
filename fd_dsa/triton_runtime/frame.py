"""The memory behind one launch: arguments, configuration and the pointers to them.

A frame is filled and given to the driver, which copies it during the call. Frames are kept and
used again; a thread takes one out of the list while it launches, so no two share one.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

from fd_dsa.triton_runtime.compiler import Compiled

WARP_SIZE = 32
_CLUSTER_DIMENSION, _CLUSTER_SCHEDULING = 4, 5
_COOPERATIVE, _OVERLAP_LAUNCHES = 2, 6
_SPREAD = 1
# CUlaunchConfig: grid 3 x u32, block 3 x u32, shared u32, stream, attributes, their number
_CONFIG = struct.Struct("=IIIIIIIxxxxQQIxxxx")
_STREAM_OFFSET = 32
# CUlaunchAttribute: number, padding to 8, value of 64 bytes
_ATTRIBUTE = struct.Struct("=Ixxxx64s")
_POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)


class Layout:
    """Where everything of a kernel's launch stands in a frame; one a loaded kernel.

    Attributes:
        values: packs all arguments and then the grid's three numbers, from offset 0 on.
        offsets: of each argument.
        grid_offset: of the grid's numbers, which begin the driver's configuration.
    """

    def __init__(
        self,
        compiled: Compiled,
        function: int,
        cooperative: bool = False,
        overlap_launches: bool = False,
    ) -> None:
        self.codes = compiled.codes
        self.offsets = [
            struct.calcsize(self.codes[:i] + "0" + code) for i, code in enumerate(self.codes)
        ]
        end = struct.calcsize(self.codes)
        self.grid_offset = -(-end // 8) * 8
        padding = f"{self.grid_offset - end}x" if self.grid_offset > end else ""
        self.values = struct.Struct(f"@{self.codes}{padding}III")
        self.num_ctas = compiled.num_ctas
        self._function = ctypes.c_void_p(function)
        self._num_null_pointers = compiled.num_null_pointers
        self._attributes = _attributes(compiled.num_ctas, cooperative, overlap_launches)
        self._num_attributes = len(self._attributes) // _ATTRIBUTE.size
        self._block = compiled.num_warps * WARP_SIZE
        self._shared_bytes = compiled.shared_bytes
        self._null = ctypes.c_uint64(0)

    def frame(self) -> Frame:
        """A new frame with no arguments yet."""
        memory = ctypes.create_string_buffer(self.grid_offset + _CONFIG.size)
        base = ctypes.addressof(memory)
        attributes = ctypes.addressof(self._attributes) if self._num_attributes else 0
        config = (1, 1, 1, self._block, 1, 1, self._shared_bytes, 0, attributes)
        _CONFIG.pack_into(memory, self.grid_offset, *config, self._num_attributes)
        null = [ctypes.addressof(self._null)] * self._num_null_pointers
        addresses = [base + offset for offset in self.offsets] + null
        pointers = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
        call = (
            ctypes.c_void_p(base + self.grid_offset),
            self._function,
            ctypes.c_void_p(ctypes.addressof(pointers)),
            None,
        )
        return Frame(memory, call, self.grid_offset + _STREAM_OFFSET, (pointers, self))


class Frame:
    """Arguments and configuration of one launch.

    Attributes:
        memory: what `Layout.values` packs into.
        call: the arguments of the driver's launch function.
        stream: the stream that the configuration names now.
    """

    __slots__ = ("_kept", "_stream_offset", "call", "memory", "stream")

    def __init__(self, memory: Any, call: tuple[Any, ...], stream_offset: int, kept: Any) -> None:
        self.memory, self.call, self.stream = memory, call, 0
        self._stream_offset, self._kept = stream_offset, kept

    def set_stream(self, stream: int) -> None:
        """Launch on this stream from now on."""
        struct.pack_into("=Q", self.memory, self._stream_offset, stream)
        self.stream = stream


def _attributes(num_ctas: int, cooperative: bool, overlap_launches: bool) -> Any:
    """The driver's launch attributes, packed."""
    values = []
    if overlap_launches:
        values.append((_OVERLAP_LAUNCHES, struct.pack("=I", 1)))
    if cooperative:
        values.append((_COOPERATIVE, struct.pack("=I", 1)))
    if num_ctas != 1:
        values.append((_CLUSTER_DIMENSION, struct.pack("=III", num_ctas, 1, 1)))
        values.append((_CLUSTER_SCHEDULING, struct.pack("=I", _SPREAD)))
    packed = b"".join(_ATTRIBUTE.pack(*value) for value in values)
    # string buffers end in a zero byte of their own
    return (ctypes.c_char * len(packed)).from_buffer_copy(packed)
