"""Zero-copy crossing between Paddle CPU tensors and NumPy, and scratch memory that is kept."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from fd_dsa.errors import DtypeError, ShapeError


def as_numpy(array: Any) -> np.ndarray:
    """NumPy view of a NumPy array or a Paddle CPU tensor; writes go to the same memory."""
    return array if isinstance(array, np.ndarray) else np.from_dlpack(array)


def on_device(array: Any) -> bool:
    """True for a tensor in device memory, False for NumPy arrays and Paddle CPU tensors."""
    return not isinstance(array, np.ndarray) and not array.place.is_cpu_place()


def readable(tensor: Any) -> Any:
    """What the operators read of a parameter: a NumPy view on a CPU, on a device the tensor."""
    tensor = tensor.detach()
    return tensor if on_device(tensor) else as_numpy(tensor)


def as_tensor(array: np.ndarray) -> Any:
    """Paddle CPU tensor on the memory of a writable NumPy array."""
    return _from_dlpack()(array)


@cache
def _from_dlpack() -> Callable[[np.ndarray], Any]:
    """Paddle's reader; imported on first use, so that NumPy alone can read the contracts."""
    from paddle.utils.dlpack import from_dlpack

    return from_dlpack


def matmul(x: Any, y: Any, *, transpose_y: bool = False) -> Any:
    """Product of two Paddle tensors; Paddle is imported by the first one."""
    return _paddle_matmul()(x, y, transpose_y=transpose_y)


@cache
def _paddle_matmul() -> Callable[..., Any]:
    """Paddle's product."""
    import paddle

    return paddle.matmul


def check_shape(operator: str, argument: str, found: Any, allowed: tuple[int | None, ...]) -> None:
    """Raise ShapeError unless `found.shape` fits `allowed` (None = any extent)."""
    shape = found.shape
    if len(shape) == len(allowed):
        for extent, wanted in zip(shape, allowed, strict=True):
            if wanted is not None and extent != wanted:
                break
        else:
            return
    text = "[" + ", ".join("*" if a is None else str(a) for a in allowed) + "]"
    raise ShapeError(f"{operator}: {argument} has shape {list(shape)}, allowed is {text}")


@cache
def _dtype_name(dtype: Any) -> str:
    """Name of a dtype of NumPy or Paddle; making it takes longer than a small sum."""
    return str(dtype).removeprefix("paddle.")


def check_dtype(operator: str, argument: str, found: Any, allowed: tuple[str, ...]) -> None:
    """Raise DtypeError unless the dtype of `found` is one of `allowed`."""
    name = _dtype_name(found.dtype)
    if name not in allowed:
        raise DtypeError(
            f"{operator}: {argument} has dtype {name}, allowed is {' or '.join(allowed)}"
        )


_STAGED_SHAPES = 1024
# larger operands are not copied: 256 KiB
_STAGED_VALUES = 1 << 16


class _Stage(threading.local):
    """A thread's memory for operands of products, and the tensors that look at it."""

    def __init__(self) -> None:
        self.buffer = np.empty(_STAGED_VALUES, np.float32)
        self.tensors: dict[tuple[int, ...], tuple[np.ndarray, Any]] = {}

    def operand(self, shape: tuple[int, ...]) -> tuple[np.ndarray, Any]:
        """An array and a tensor of `shape` on the same memory, valid until the next call."""
        pair = self.tensors.get(shape)
        if pair is None:
            size = math.prod(shape)
            if len(self.tensors) >= _STAGED_SHAPES:
                self.tensors.clear()
            array = self.buffer[:size].reshape(shape)
            pair = self.tensors[shape] = array, as_tensor(array)
        return pair


_stage = _Stage()


def staged(x: np.ndarray) -> Any:
    """A tensor with the values of `x`, good for one product.

    Making a tensor costs more than a small product, copying a few rows does not: the values go
    to memory that has its tensor already. The tensor is overwritten by the next call of the
    thread, so it must be consumed at once.
    """
    if x.size > _STAGED_VALUES:
        return as_tensor(np.ascontiguousarray(x))
    array, tensor = _stage.operand(x.shape)
    np.copyto(array, x)
    return tensor


class Scratch:
    """Named buffers that grow and are then reused, so a step allocates none.

    Fresh memory of that size costs more in page faults than the arithmetic done in it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """Uninitialised C-contiguous array of `shape`; valid until the same name is taken again."""
        size = int(np.prod(shape, dtype=np.int64))
        key = (name, np.dtype(dtype).str)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            buffer = np.empty(max(size, 1), dtype)
            self._buffers[key] = buffer
        return buffer[:size].reshape(shape)
