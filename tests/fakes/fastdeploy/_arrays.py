"""The values of tensors as NumPy arrays, for operators that a GPU would run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle

from fastdeploy import _counters


def host(tensor: Any) -> np.ndarray:
    """Values of a tensor, float32 for bfloat16; on a CPU the tensor's own memory else.

    A tensor without elements has no memory to share: its array is a new one.
    """
    with _counters.quiet():
        tensor = tensor.detach()
        if not tensor.place.is_cpu_place():
            tensor = tensor.cpu()
        if 0 in tensor.shape:
            return np.empty(tensor.shape, _NUMPY.get(tensor.dtype, np.float32))
        if tensor.dtype == paddle.bfloat16:
            bits = np.from_dlpack(tensor.contiguous().view("int16")).view(np.uint16)
            return (bits.astype(np.uint32) << 16).view(np.float32)
        if tensor.dtype == paddle.float8_e4m3fn:
            tensor = tensor.view("uint8")
        return _writable(np.from_dlpack(tensor))


def _writable(view: np.ndarray) -> np.ndarray:
    """The same memory, for writing: NumPy before 2.2.5 gives views of tensors that are not."""
    address, _ = view.__array_interface__["data"]
    interface = view.__array_interface__ | {"data": (address, False)}
    return np.asarray(SimpleNamespace(__array_interface__=interface, view=view))


@contextmanager
def writable(tensor: Any) -> Iterator[np.ndarray]:
    """An array to write to; what it holds at the end is in the tensor's memory, same address."""
    values = host(tensor)
    in_place = tensor.place.is_cpu_place() and tensor.dtype != paddle.bfloat16
    if not in_place:
        values = values.copy()
    yield values
    if not in_place and values.size:
        with _counters.quiet():
            tensor.copy_(tensor_of(values, tensor.place, tensor.dtype), False)


def tensor_of(values: np.ndarray, place: Any, dtype: Any = None) -> Any:
    """A new tensor with these values; bfloat16 are rounded to nearest, ties to even."""
    with _counters.quiet():
        values = np.ascontiguousarray(values)
        if dtype in (paddle.bfloat16, "bfloat16"):
            bits = values.astype(np.float32).view(np.uint32)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            as_bits = paddle.to_tensor(bits.astype(np.uint16).view(np.int16), place=place)
            return as_bits.view("bfloat16")
        if dtype in (paddle.float8_e4m3fn, "float8_e4m3fn"):
            return paddle.to_tensor(values, place=place).view("float8_e4m3fn")
        return paddle.to_tensor(values, dtype=dtype, place=place)


def like(values: np.ndarray, tensor: Any) -> Any:
    """A new tensor with these values at `tensor`'s place, in its dtype."""
    return tensor_of(values, tensor.place, tensor.dtype)


_NUMPY = {
    paddle.uint8: np.uint8,
    paddle.int32: np.int32,
    paddle.int64: np.int64,
    paddle.bool: np.bool_,
    paddle.float8_e4m3fn: np.uint8,
}
