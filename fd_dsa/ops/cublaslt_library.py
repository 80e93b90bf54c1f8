"""Library cuBLASLt of this process, and calls of its C functions that raise errors.

Source: NVIDIA, cublasLt.h and the cuBLAS documentation, "Using the cuBLASLt API".
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from fd_dsa.errors import BackendUnavailable, DeviceError
from fd_dsa.ops.library_kernel import interpreter_refusal
from fd_dsa.triton_runtime.driver import cuda

_NAMES = "libcublasLt.so.13", "libcublasLt.so.12"
_BLOCK_SCALES_SINCE, _HOPPER = 120900, 90


def library_names(maps: str) -> tuple[str, ...]:
    """Return the libraries to try: the loaded cuBLASLt, or that of the loaded cuBLAS, or names.

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
    """Return the cuBLASLt of this process.

    Tensors must be on a device already, because their library loads the cuBLASLt of its release.

    Raises:
        BackendUnavailable: cuBLASLt is neither loaded nor found.
    """
    for name in library_names(Path("/proc/self/maps").read_text()):
        with suppress(OSError):
            found = ctypes.CDLL(name)
            found.cublasLtGetVersion.restype = ctypes.c_size_t
            found.cublasLtGetStatusName.restype = ctypes.c_char_p
            return found
    raise BackendUnavailable(f"no cuBLASLt is loaded or installed ({' or '.join(_NAMES)})")


def fp8_unsupported_reason(capability: int) -> str:
    """Return the reason why a GPU does not support `fp8_linear`, or "".

    Args:
        capability: compute capability, major * 10 + minor.
    """
    if interpreter_refusal():
        return interpreter_refusal()
    try:
        version = library().cublasLtGetVersion()
    except BackendUnavailable as error:
        return str(error)
    if version < _BLOCK_SCALES_SINCE:
        return f"cuBLASLt {version} has no block scales, {_BLOCK_SCALES_SINCE} and newer have"
    if capability != _HOPPER:
        return f"cuBLASLt has block scales of 128 only on GPUs of capability 90, not {capability}"
    return ""


class Functions:
    """C functions of cuBLASLt on one device.

    Args:
        library: the result of `library`, or an object with the same functions.
        device: number of the device.
    """

    def __init__(self, library: ctypes.CDLL, device: int) -> None:
        self._library, self._device = library, device

    def call(self, what: object, name: str, *arguments: object) -> None:
        """Call a function in the device's context.

        Args:
            what: description of the work, for the error.
            name: name of the function.
            arguments: ctypes objects, or ints of 32 bits.

        Raises:
            DeviceError: the function failed.
        """
        status = cuda().run_on(self._device, getattr(self._library, name), *arguments)
        if status:
            raise self.error(status, what, name)

    def error(self, status: int, what: object, name: str) -> DeviceError:
        """Return the error of a function that returned `status`."""
        return DeviceError(
            f"{name}: {self._library.cublasLtGetStatusName(status).decode()}: {what}"
        )

    def made(self, name: str, *arguments: object) -> ctypes.c_void_p:
        """Call a function that creates an object, and return the object."""
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
