"""Launches of kernels in a C library, as custom_ops/ builds them, on the current stream."""

from __future__ import annotations

import ctypes
from typing import Any

from fd_dsa.errors import DeviceError
from fd_dsa.triton_runtime.driver import cuda
from fd_dsa.triton_runtime.transfers import Transfers


class CLaunch:
    """Calls `int function(const Structure*, void* stream)`, which answers with a CUDA error.

    A call costs the look-up of the current stream and one foreign call. The structure is read
    during the call, so it may change between two calls. One thread at a time.

    Args:
        kernels: the loaded library.
        function: name of the launcher.
        structure: its first argument.
        transfers: of the tensors whose addresses the structure holds; its stream takes the work.

    Raises:
        AttributeError: the library has no such function.
    """

    def __init__(
        self, kernels: Any, function: str, structure: ctypes.Structure, transfers: Transfers
    ) -> None:
        self._name, self._kernels = function, kernels
        self._function = getattr(kernels, function)
        self._argument = ctypes.byref(structure)
        self._stream, self._device = transfers.stream, transfers.device
        self._many_devices = cuda().num_devices > 1

    def __call__(self) -> None:
        """Queue the kernel.

        Raises:
            DeviceError: the CUDA runtime refuses the launch, or earlier work has failed.
        """
        # the runtime takes the device of the thread's context, or the first where it has none
        if self._many_devices and cuda().current_device() != self._device:
            with cuda().context(self._device):
                code = self._function(self._argument, self._stream())
        else:
            code = self._function(self._argument, self._stream())
        if code:
            text = self._kernels.fd_dsa_cuda_error
            text.restype = ctypes.c_char_p
            raise DeviceError(f"{self._name}: CUDA error {code}: {text(code).decode()}")
