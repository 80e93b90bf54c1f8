"""One compiled and loaded form of a kernel: its launch, and the memory of a launch.

A frame holds the arguments, the configuration and the pointers to them. It is filled and passed
to the driver, which copies it during the call. Frames are used again; a thread takes one out of the
list while it launches, so no two share one.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping

from fd_dsa.triton_runtime.compiler import Argument, Compiled
from fd_dsa.triton_runtime.driver import Driver
from fd_dsa.triton_runtime.parameters import Parameter, Signature

_WARP_SIZE = 32
# scratch pointers that a kernel takes after its arguments, null here: one or two by Triton version
_SCRATCH_POINTERS = 2
_OVERLAP_LAUNCHES = 6
# CUlaunchConfig: grid 3 x u32, block 3 x u32, shared u32, stream, attributes, their number
_CONFIG = struct.Struct("=IIIIIIIxxxxQQIxxxx")
_STREAM_OFFSET = 32
# CUlaunchAttribute: number, padding to 8, value of 64 bytes
_ATTRIBUTE = struct.Struct("=Ixxxx64s")


class Frame:
    """Arguments and configuration of one launch.

    Attributes:
        memory: what `Variant.values` packs into.
        call: the arguments of the driver's launch function.
        grid: the three numbers that `memory` has now.
        stream: the stream that the configuration names now.
    """

    __slots__ = ("_kept", "_stream_offset", "call", "grid", "memory", "stream")

    def __init__(
        self,
        memory: ctypes.Array[ctypes.c_char],
        call: tuple[object, ...],
        stream_offset: int,
        kept: object,
    ) -> None:
        self.memory, self.call, self.stream = memory, call, 0
        self.grid: tuple[int, int, int] | None = None
        self._stream_offset, self._kept = stream_offset, kept

    def set_stream(self, stream: int) -> None:
        """Launch on this stream from now on."""
        struct.pack_into("=Q", self.memory, self._stream_offset, stream)
        self.stream = stream


class Variant:
    """A loaded kernel for fixed dtypes, alignments, constants, options and device.

    Attributes:
        device: index of the device that it is loaded on.
        compiled: what the compiler says about it.
        queue: called with `*frame.call` to launch a frame; returns an error code of the driver.
        passed: the parameters whose values a launch passes, in order.
        values: packs all their values and then the grid's three numbers, from offset 0 on.
        offsets: of each value in a frame.
        grid_offset: of the grid's numbers, which begin the driver's configuration.
        free: frames that no launch uses now.
    """

    def __init__(
        self,
        signature: Signature,
        arguments: Mapping[str, Argument],
        options: Mapping[str, object],
        compiled: Compiled,
        function: int,
        device: int,
        driver: Driver,
    ) -> None:
        self.signature, self.arguments, self.device = signature, arguments, device
        self.compiled, self.driver, self.queue = compiled, driver, driver.library.cuLaunchKernelEx
        self.free: list[Frame] = []
        self.passed: list[Parameter] = [
            parameter
            for parameter in signature.parameters.values()
            if arguments[parameter.name].type != "constexpr"
        ]
        codes = compiled.codes
        self.offsets = [struct.calcsize(codes[:i] + "0" + code) for i, code in enumerate(codes)]
        end = struct.calcsize(codes)
        self.grid_offset = -(-end // 8) * 8
        padding = f"{self.grid_offset - end}x" if self.grid_offset > end else ""
        self.values = struct.Struct(f"@{codes}{padding}III")
        self._function = ctypes.c_void_p(function)
        packed = _ATTRIBUTE.pack(_OVERLAP_LAUNCHES, struct.pack("=I", 1))
        self._early = ctypes.create_string_buffer(packed) if options["launch_pdl"] else None
        self._null = ctypes.c_uint64(0)

    def frame(self, values: Mapping[str, object] | None = None) -> Frame:
        """A new frame with these arguments, or none yet, and no grid."""
        compiled = self.compiled
        memory = ctypes.create_string_buffer(self.grid_offset + _CONFIG.size)
        base, block = ctypes.addressof(memory), compiled.num_warps * _WARP_SIZE
        attributes = (0, 0) if self._early is None else (ctypes.addressof(self._early), 1)
        config = (1, 1, 1, block, 1, 1, compiled.shared_bytes, 0, *attributes)
        if values is not None:
            passed = (values[parameter.name] for parameter in self.passed)
            plain = (v.data_ptr() if hasattr(v, "data_ptr") else v for v in passed)
            self.values.pack_into(memory, 0, *plain, 1, 1, 1)
        _CONFIG.pack_into(memory, self.grid_offset, *config)
        addresses = [base + offset for offset in self.offsets]
        addresses += [ctypes.addressof(self._null)] * _SCRATCH_POINTERS
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        call = (
            ctypes.c_void_p(base + self.grid_offset),
            self._function,
            ctypes.c_void_p(ctypes.addressof(pointers)),
            None,
        )
        return Frame(memory, call, self.grid_offset + _STREAM_OFFSET, (pointers, self))

    def recover(self, code: int, frame: Frame) -> None:
        """Launch again if it failed for want of a context; see `Driver.recover`."""
        what = f"launch of kernel {self.signature.kernel}"
        self.driver.recover(code, self.device, what, self.queue, frame.call)
