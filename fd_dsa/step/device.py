"""The device provider: a step's metadata in one launch, in buffers that never move."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from fd_dsa.environment import step_checks_requested
from fd_dsa.errors import BackendUnavailable, DtypeError, ShapeError
from fd_dsa.step import checks
from fd_dsa.step.checks import StepCounts, StepHints, StepInputs, StepLimits
from fd_dsa.step.forward_meta import Array, ForwardMeta
from fd_dsa.step.launch import StepLaunch
from fd_dsa.step.staging import StagedInputs
from fd_dsa.step.views import Allocate, StepViews, new_buffers
from fd_dsa.triton_runtime.transfers import on_host, transfers_for


class DeviceProvider:
    """Steps in the memory of a GPU.

    Args:
        limits: sizes that every step keeps to.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        int32_position_ids: whether positions are written as int32 too.
    """

    def __init__(
        self, limits: StepLimits, allocate: Allocate, int32_position_ids: bool = False
    ) -> None:
        self._limits, self._allocate = limits, allocate
        buffers = new_buffers(limits, allocate, int32_position_ids)
        self._views = StepViews(buffers, lambda tensor: tensor)
        self._launch = StepLaunch(limits, buffers)
        a_buffer: Any = buffers["cu_seqlens_q"]
        self._int32, self._transfers = a_buffer.dtype, transfers_for(a_buffer)
        self._staging: StagedInputs | None = None
        self._reads_back = step_checks_requested()

    def build(self, arrays: tuple[Array, ...], hints: StepHints) -> ForwardMeta:
        """The step of four device tensors or NumPy arrays; see `StepMetadataBuilder.build`."""
        is_host = {isinstance(array, np.ndarray) for array in arrays}
        if len(is_host) != 1 or not all(hasattr(array, "shape") for array in arrays):
            kinds = ", ".join(type(array).__name__ for array in arrays)
            raise DtypeError(
                f"{', '.join(StepInputs._fields)}: got {kinds}, allowed are four NumPy arrays or "
                "four tensors on the builder's device; do not mix them"
            )
        is_captured = False
        if is_host.pop():
            inputs, counts = self._stage(arrays, hints)
        else:
            is_captured = self._transfers.is_capturing()
            inputs, counts = arrays, self._check_tensors(arrays, hints, is_captured)
        self._launch(inputs, counts, is_captured)
        return self._views.forward_meta(inputs, counts)

    def _stage(self, arrays: tuple[Array, ...], hints: StepHints) -> tuple[Any, StepCounts]:
        """Check host arrays in full and queue their copy to the device."""
        step = checks.check_host_step(arrays, self._limits, hints)
        if self._staging is None:
            rows, columns = self._limits.max_num_seqs, self._limits.max_blocks_per_seq
            self._staging = StagedInputs(self._allocate, (rows,) * 3, rows, columns)
        *lengths, tables = step.inputs
        return self._staging.upload(lengths, tables), step.counts

    def _check_tensors(
        self, tensors: tuple[Array, ...], hints: StepHints, is_captured: bool
    ) -> StepCounts:
        """Check shapes, dtypes and counts of device tensors; their values only on request."""
        checks.check_arrays(tensors, self._int32, self._limits)
        for name, tensor in zip(StepInputs._fields, tensors, strict=True):
            # rows of a table may lie apart, the values of one must not
            if tensor.shape[0] and tensor.shape[-1] > 1 and tensor.stride()[-1] != 1:
                raise ShapeError(
                    f"{name}: got strides {list(tensor.stride())}, the last must be 1; "
                    "call .contiguous() first"
                )
        counts = checks.check_device_counts(self._limits, hints)
        if self._reads_back and not is_captured:
            like = [np.empty(tuple(tensor.shape), np.int32) for tensor in tensors]
            values = (on_host(t.contiguous(), x) for t, x in zip(tensors, like, strict=True))
            checks.check_values(StepInputs(*values), self._limits, hints)
        return counts


def paddle_place(device: str) -> Any:
    """Paddle's place of "gpu", "gpu:1" or a custom device such as "name:0".

    Raises:
        BackendUnavailable: Paddle is missing, or serves no such device.
    """
    try:
        import paddle
    except ImportError as error:
        raise BackendUnavailable(
            f"device: {device!r} needs Paddle, which is not installed; the extra `gpu` names it"
        ) from error
    counts = paddle_device_counts()
    kind, _, number = device.partition(":")
    if kind in counts and (number or "0") in map(str, range(counts[kind])):
        place = paddle.CUDAPlace if kind == "gpu" else partial(paddle.CustomPlace, kind)
        return place(int(number or 0))
    served = ", ".join(f"'{name}:{i}'" for name, n in counts.items() for i in range(n)) or "none"
    raise BackendUnavailable(
        f"device: got {device!r}, allowed are 'cpu' (Paddle tensors), 'numpy' (no Paddle) and "
        f"the devices of the installed Paddle ({served}); 'gpu' needs paddlepaddle-gpu and a GPU"
    )


def paddle_device_counts() -> dict[str, int]:
    """How many devices of each kind the installed Paddle has, the CPU left out."""
    import paddle

    count_of = paddle.framework.core.get_custom_device_count
    counts = {kind: count_of(kind) for kind in paddle.device.get_all_custom_device_type() or []}
    if paddle.device.is_compiled_with_cuda():
        counts["gpu"] = paddle.device.cuda.device_count()
    return counts


def paddle_allocator(device: str) -> Allocate:
    """Makes uninitialised Paddle tensors on a device; see `paddle_place`."""
    place = paddle_place(device)
    import paddle

    return lambda shape, dtype: paddle.empty(list(shape), dtype, device=place)
