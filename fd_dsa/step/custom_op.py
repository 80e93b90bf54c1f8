"""A step's metadata by the CUDA C++ kernel of custom_ops/, called through its C ABI.

Paddle's own way to the same kernel, the operator `fd_dsa_step_metadata`, costs several times the
host time of this call and copies a block table whose rows lie apart.
"""

from __future__ import annotations

import ctypes
from typing import Any

from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.step.checks import INT32_MAX, StepInputs, StepLimits
from fd_dsa.step.forward_meta import Array
from fd_dsa.step.views import OUTPUTS, WINDOWS, OutputBuffers
from fd_dsa.triton_runtime.c_launch import CLaunch
from fd_dsa.triton_runtime.device import api_for_type

_NUMBERS = (
    "num_rows",
    "num_padded_rows",
    "num_padded_tokens",
    "num_columns",
    "block_size",
    "last_block",
)


class _Step(ctypes.Structure):
    """FdDsaStep of custom_ops/csrc/step_metadata.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*StepInputs._fields, *OUTPUTS, *WINDOWS)),
        ("row_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in _NUMBERS),
    )


class CustomOpForm:
    """One form of the kernel over fixed buffers, with or without the windows of prefill rows.

    Args:
        limits: sizes that every step keeps to.
        buffers: where the kernel writes.
        has_prefill: whether it writes windows.
        kernels: the loaded library.

    Raises:
        BackendUnavailable: the library is of another release.
        LaunchError: the buffers are not in GPU memory.
    """

    def __init__(
        self, limits: StepLimits, buffers: OutputBuffers, has_prefill: bool, kernels: Any
    ) -> None:
        if kernels.fd_dsa_step_bytes() != ctypes.sizeof(_Step):
            raise BackendUnavailable(
                "fd_dsa_ops: its step_metadata takes another structure than this fd_dsa passes; "
                "build it again: make custom-ops"
            )
        self._api = api_for_type(type(buffers.cu_seqlens_q))
        self._device = self._api.device_of(buffers.cu_seqlens_q)
        self._step = _Step(
            num_padded_rows=limits.max_num_seqs,
            num_columns=limits.max_blocks_per_seq,
            block_size=limits.block_size,
            last_block=INT32_MAX if limits.num_blocks is None else limits.num_blocks - 1,
        )
        name = "fd_dsa_step_metadata_cuda"
        self._launch = CLaunch(kernels, name, self._step, self._api, self._device)
        # the addresses are good for as long as these live
        self._buffers = [getattr(buffers, name) for name in (*OUTPUTS, *WINDOWS)]
        for name, tensor in zip((*OUTPUTS, *WINDOWS), self._buffers, strict=True):
            if tensor is not None and (has_prefill or name not in WINDOWS):
                setattr(self._step, name, tensor.data_ptr())
        self._inputs: tuple[Array, ...] = ()
        self._addresses: list[int] = []

    def launch(
        self, inputs: tuple[Array, ...], num_rows: int, num_padded_tokens: int, row_stride: int
    ) -> None:
        """Queue the kernel on the current stream, over rows and padded tokens.

        Raises:
            LaunchError: an input is not on the device of the buffers.
            DeviceError: the CUDA runtime refuses the launch.
        """
        addresses = [tensor.data_ptr() for tensor in inputs]
        if addresses != self._addresses:
            self._take(inputs, addresses)
        step = self._step
        step.num_rows, step.num_padded_tokens = num_rows, num_padded_tokens
        step.row_stride = row_stride
        self._launch()

    def _take(self, inputs: tuple[Array, ...], addresses: list[int]) -> None:
        """Remember inputs at other addresses than those of the last step."""
        for name, tensor, address in zip(StepInputs._fields, inputs, addresses, strict=True):
            if tensor.shape[0] and self._api.device_of(tensor) != self._device:
                raise LaunchError(
                    f"step_metadata: {name} is on device {self._api.device_of(tensor)}, the "
                    f"builder's buffers are on device {self._device}"
                )
            setattr(self._step, name, address)
        # held, so that nothing else can come to lie at these addresses
        self._inputs, self._addresses = inputs, addresses
