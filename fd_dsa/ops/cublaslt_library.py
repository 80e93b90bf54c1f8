"""The cuBLASLt that this process has loaded, and its C functions with errors by name.

Source: NVIDIA, cublasLt.h and the cuBLAS documentation, "Using the cuBLASLt API".
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from fd_dsa.errors import BackendUnavailable, DeviceError
from fd_dsa.ops.library_kernel import why_not_compiled
from fd_dsa.triton_runtime.driver import cuda

_NAMES = "libcublasLt.so.13", "libcublasLt.so.12"
_BLOCK_SCALES_SINCE, _HOPPER = 120900, 90


def library_names(maps: str) -> tuple[str, ...]:
    """What to load: the cuBLASLt of this process, or that of its cuBLAS, else by name.

    Args:
        maps: text of /proc/self/maps.
    """
    lines = (line.split(maxsplit=5) for line in maps.splitlines())
    paths = sorted({Path(fields[5]) for fields in lines if len(fields) == 6})
    loaded = [str(path) for path in paths if path.name.startswith("libcublasLt.so.")]
    beside = [
        str(path.with_name(path.name.replace("libcublas", "libcublasLt")))
        for path in paths
        if path.name.startswith("libcublas.so.")
    ]
    return tuple(loaded[:1] or beside) or _NAMES


@cache
def library() -> ctypes.CDLL:
    """The cuBLASLt of this process; ask once tensors are on a device, which loads theirs.

    Raises:
        BackendUnavailable: none is loaded or found.
    """
    for name in library_names(Path("/proc/self/maps").read_text()):
        with suppress(OSError):
            found = ctypes.CDLL(name)
            found.cublasLtGetVersion.restype = ctypes.c_size_t
            found.cublasLtGetStatusName.restype = ctypes.c_char_p
            return found
    raise BackendUnavailable(f"no cuBLASLt is loaded or installed ({' or '.join(_NAMES)})")


def why_not_fp8(capability: int) -> str:
    """Why `fp8_linear` cannot serve on such a GPU, in a line; "" if it can.

    Args:
        capability: major * 10 + minor.
    """
    if why_not_compiled():
        return why_not_compiled()
    try:
        version = library().cublasLtGetVersion()
    except BackendUnavailable as error:
        return str(error)
    if version < _BLOCK_SCALES_SINCE:
        return f"cuBLASLt {version} has no block scales, {_BLOCK_SCALES_SINCE} and newer have"
    if capability != _HOPPER:
        return f"cuBLASLt has block scales of 128 on GPUs of capability 90 alone, not {capability}"
    return ""


class Functions:
    """cuBLASLt's C functions on one device.

    Args:
        library: of `library`, or something with the same functions.
    """

    def __init__(self, library: ctypes.CDLL, device: int) -> None:
        self._library, self._device = library, device
        self._several = cuda().num_devices > 1

    def call(self, what: object, name: str, *arguments: object) -> None:
        """Call a function in the device's context with ctypes objects, or ints of 32 bits.

        Raises:
            DeviceError: function, status and `what`, the work.
        """
        function = getattr(self._library, name)
        if self._several and cuda().current_device() != self._device:
            with cuda().context(self._device):
                status = function(*arguments)
        else:
            status = function(*arguments)
        if status:
            raise self.error(status, what, name)

    def error(self, status: int, what: object, name: str) -> DeviceError:
        return DeviceError(
            f"{name}: {self._library.cublasLtGetStatusName(status).decode()}: {what}"
        )

    def made(self, name: str, *arguments: object) -> ctypes.c_void_p:
        """What a function makes and writes to its first argument."""
        handle = ctypes.c_void_p()
        self.call(f"on device {self._device}", name, ctypes.byref(handle), *arguments)
        return handle

    def set(
        self,
        name: str,
        owner: ctypes.c_void_p,
        attribute: int,
        value: ctypes._SimpleCData[Any],
    ) -> None:
        """Set an attribute to the value of a ctypes object."""
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self.call(f"attribute {attribute}", name, owner, attribute, ctypes.byref(value), size)
