"""NumPy arrays and Paddle CPU tensors that share one memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import BackendUnavailable, DtypeError
from fd_dsa.tensor import Tensor

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_DLPACK_CPU = 1


def host_array(name: str, value: Any) -> npt.NDArray[Any]:
    """Return a NumPy array on the memory of `value`.

    Args:
        name: name of the argument, for errors.
        value: a Paddle CPU tensor, or a NumPy array, which is returned itself.

    Raises:
        BackendUnavailable: a tensor on a device.
        DtypeError: `value` is neither an array nor a tensor.
    """
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "__dlpack_device__"):
        raise DtypeError(
            f"{name}: got {type(value).__name__}, allowed are a NumPy array and a Paddle tensor "
            "of int32; convert it with numpy.asarray(value, numpy.int32)"
        )
    try:
        on_host = int(value.__dlpack_device__()[0]) == _DLPACK_CPU
    except RuntimeError:
        # Paddle raises this for its custom devices, because DLPack has no number for them
        on_host = False
    if not on_host:
        raise BackendUnavailable(
            f"{name}: is on {getattr(value, 'place', 'a device')}, but this builder reads host "
            "memory; build with the device of the tensors, for example device='gpu'"
        )
    return np.from_dlpack(value)


def as_tensor(array: np.ndarray) -> Tensor:
    """Return a Paddle CPU tensor on the memory of a C-contiguous NumPy array.

    The tensor keeps the array alive.

    In Paddle 3.3 each call of `from_dlpack` and of the tensor's constructor leaks 64 to 80 bytes.
    If `from_dlpack` puts several tensors on one address, only one of them frees its memory, and
    buffers that larger ones have replaced stay. Therefore a Paddle operator makes the tensor, and
    the tensor then gets the array.

    Raises:
        ValueError: the array is not C-contiguous, so that Paddle would copy it.
    """
    if not array.flags.c_contiguous:
        raise ValueError(
            f"array: its strides are {array.strides}, allowed are those of a C-contiguous array "
            f"of shape {array.shape}"
        )
    blank, place = _blank()
    tensor = blank.clone()
    tensor.get_tensor().set(array, place, True)
    return tensor


@cache
def _blank() -> tuple[Any, Any]:
    """Return a tensor to clone, and its place. Paddle is imported at the first call."""
    import paddle

    place = paddle.CPUPlace()
    return paddle.to_tensor(0.0, place=place), place
