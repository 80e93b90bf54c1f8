"""Zero-copy crossing between Paddle CPU tensors and NumPy, and scratch memory that is kept."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from fd_dsa.cache_formats import FORMAT_OF_DTYPE, CacheFormat
from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.tensor import Array, Tensor


def as_numpy(array: Array) -> np.ndarray:
    """NumPy view of a NumPy array or a Paddle CPU tensor; writes go to the same memory."""
    if isinstance(array, np.ndarray):
        return array
    view = np.from_dlpack(array)  # type: ignore[arg-type]  # Paddle's method takes no arguments
    if view.flags.writeable:
        return view
    # with NumPy before 2.2.5, or Paddle before 3.3, views of tensors are read-only
    address, _ = view.__array_interface__["data"]
    interface = view.__array_interface__ | {"data": (address, False)}
    # NumPy keeps the object that it had the interface from, and so the tensor
    return np.asarray(SimpleNamespace(__array_interface__=interface, view=view))


def on_device(array: Array) -> TypeGuard[Tensor]:
    """True for a tensor in device memory, False for NumPy arrays and Paddle CPU tensors."""
    return not isinstance(array, np.ndarray) and not array.place.is_cpu_place()


def allocator_beside(tensor: Tensor) -> Callable[[tuple[int, ...], str], Tensor]:
    """Makes Paddle tensors, uninitialised, where a Paddle tensor is."""
    import paddle

    place = tensor.place
    return lambda shape, dtype: paddle.empty(list(shape), dtype, device=place)


def readable(tensor: Tensor) -> Array:
    """What the operators read of a parameter: a NumPy view on a CPU, on a device the tensor."""
    tensor = tensor.detach()
    return tensor if on_device(tensor) else as_numpy(tensor)


def matmul(x: Tensor, y: Tensor, *, transpose_y: bool = False) -> Tensor:
    """Product of two Paddle tensors; Paddle is imported by the first one."""
    import paddle

    return paddle.matmul(x, y, transpose_y=transpose_y)


def check_shape(
    operator: str, argument: str, value: object, allowed: tuple[int | None, ...]
) -> None:
    """Raise ShapeError unless `value` is an array whose shape fits `allowed` (None = any)."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape) == len(allowed):
        for extent, expected in zip(shape, allowed, strict=True):
            if expected is not None and extent != expected:
                break
        else:
            return
    text = "[" + ", ".join("*" if a is None else str(a) for a in allowed) + "]"
    if shape is None:
        text = f"{_kind_of(value)}, allowed is an array of shape {text}"
        raise ShapeError(f"{operator}: {argument} is {text}")
    raise ShapeError(f"{operator}: {argument} has shape {list(shape)}, allowed is {text}")


def _kind_of(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


CACHE_DTYPES = ("float32", "bfloat16", "int16", "uint8")
"""Names of the dtypes of caches."""


def cache_format(cache: Array) -> CacheFormat:
    """Return the format of a cache whose dtype is one of `CACHE_DTYPES`."""
    return FORMAT_OF_DTYPE[dtype_name(cache.dtype)]


@cache
def dtype_name(dtype: object) -> str:
    """Name of a dtype without its package; making it takes longer than a small sum."""
    return str(dtype).rpartition(".")[2]


def check_dtype(operator: str, argument: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise DtypeError unless `value` is an array whose dtype is one of `allowed`."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and dtype_name(dtype) in allowed:
        return
    text = " or ".join(allowed)
    if dtype is None:
        text = f"{_kind_of(value)}, allowed is an array of {text}"
        raise DtypeError(f"{operator}: {argument} is {text}")
    raise DtypeError(f"{operator}: {argument} has dtype {dtype_name(dtype)}, allowed is {text}")


def check_array(
    operator: str,
    argument: str,
    value: object,
    shape: tuple[int | None, ...],
    dtypes: tuple[str, ...],
) -> None:
    """`check_shape` and `check_dtype` of one argument; a microsecond."""
    check_shape(operator, argument, value, shape)
    check_dtype(operator, argument, value, dtypes)


def check_rope(
    operator: str, position_ids: Array | None, cos_sin_cache: Array, num_tokens: int, width: int
) -> None:
    """Refuse a table of cos and sin without a row a token, or whose pairs are wider than `width`.

    Args:
        position_ids: rows of the table, int64 [num_tokens]; None = row t belongs to token t.
    """
    rows = num_tokens if position_ids is None else None
    if position_ids is not None:
        check_array(operator, "position_ids", position_ids, (num_tokens,), ("int64",))
    check_array(operator, "cos_sin_cache", cos_sin_cache, (rows, None), ("float32",))
    num_rows, rope_dim = cos_sin_cache.shape
    if rows is None and num_rows == 0:
        raise ShapeError(f"{operator}: cos_sin_cache has no row, allowed is one a position")
    if rope_dim % 2 or not 0 < rope_dim <= width:
        raise ShapeError(
            f"{operator}: cos_sin_cache has rows of {rope_dim} values, allowed are even numbers "
            f"from 2 to {width}"
        )


def outer_strides(operator: str, argument: str, tensor: Tensor) -> list[int]:
    """Values from one entry to the next along each axis of a device's tensor but the last.

    Raises:
        ShapeError: the values of the last axis are not contiguous.
    """
    *outer, step = tensor.stride()
    if step != 1 and tensor.shape[-1] > 1 and all(tensor.shape):
        raise ShapeError(
            f"{operator}: values of a row of {argument} are {step} apart, a device needs them "
            "contiguous"
        )
    return outer


def check_values(operator: str, argument: str, values: np.ndarray, low: int, stop: int) -> None:
    """Raise ValueError unless all `values` are in [low, stop); reads every value."""
    if values.size == 0 or (values.min() >= low and values.max() < stop):
        return
    place = tuple(int(i) for i in np.argwhere((values < low) | (values >= stop))[0])
    index = ", ".join(map(str, place))
    raise ValueError(
        f"{operator}: {argument}[{index}] is {values[place]}, allowed is {low} to {stop - 1}"
    )


def check_writable(operator: str, argument: str, value: Array) -> None:
    """Raise ValueError if `value`, a CPU tensor or a NumPy array, may not be written to."""
    if not as_numpy(value).flags.writeable:
        raise ValueError(f"{operator}: {argument} is read-only, allowed is a writable array")


def result(
    operator: str,
    out: Array | None,
    beside: Array,
    shape: tuple[int, ...],
    dtype: str,
    fill: float | None = None,
) -> Array:
    """Where an operator writes: `out` if there is one, checked, else new memory.

    Args:
        beside: an argument of the operator; new memory is of its kind, and where it is.
        shape: of the result; with `fill` the last extent of an `out` may be larger.
        fill: what new memory holds; None = anything.

    Raises:
        ShapeError, DtypeError, ValueError: `out` has another shape or dtype, gaps between its
            values, or is read-only.
    """
    if out is None:
        if isinstance(beside, np.ndarray):
            return np.empty(shape, dtype) if fill is None else np.full(shape, fill, dtype)
        made = allocator_beside(beside)(shape, dtype)
        return made if fill is None else made.fill_(fill)
    check_dtype(operator, "out", out, (dtype,))
    check_shape(operator, "out", out, shape if fill is None else (*shape[:-1], None))
    if out.shape[-1] < shape[-1]:
        raise ShapeError(
            f"{operator}: out has rows of {out.shape[-1]} values, allowed are {shape[-1]} and more"
        )
    if on_device(out):
        dense = out.is_contiguous()
    else:
        check_writable(operator, "out", out)
        dense = as_numpy(out).flags.c_contiguous
    if not dense:
        raise ShapeError(f"{operator}: out of shape {list(out.shape)} is not contiguous")
    return out


_STAGED_SHAPES = 1024
# larger operands are not copied: 256 KiB
_STAGED_VALUES = 1 << 16


class _Stage(threading.local):
    """A thread's memory for operands of GEMMs, and arrays and tensors that are views of it."""

    def __init__(self) -> None:
        self.buffer = np.empty(_STAGED_VALUES, np.float32)
        self.views: dict[tuple[int, ...], tuple[np.ndarray, Any]] = {}


_stage = _Stage()


def staged(x: np.ndarray) -> Tensor:
    """A tensor with the values of `x`, good for one GEMM.

    Making a tensor costs more than a small GEMM, copying a few rows does not: the values go
    to memory that has its tensor already. The tensor is overwritten by the next call of the
    thread, so it must be consumed at once.
    """
    if x.size > _STAGED_VALUES:
        return as_tensor(np.ascontiguousarray(x))
    views = _stage.views
    if x.shape not in views:
        if len(views) >= _STAGED_SHAPES:
            views.clear()
        array = _stage.buffer[: x.size].reshape(x.shape)
        views[x.shape] = array, as_tensor(array)
    array, tensor = views[x.shape]
    np.copyto(array, x)
    return tensor


class Scratch:
    """Named buffers that grow and are then reused, so a step allocates none.

    Fresh memory of that size costs more in page faults than the arithmetic done in it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Any], np.ndarray] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32
    ) -> np.ndarray:
        """Uninitialised C-contiguous array of `shape`; valid until the same name is taken again."""
        size, key = math.prod(shape), (name, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            buffer = np.empty(max(size, 1), dtype)
            self._buffers[key] = buffer
        return buffer[:size].reshape(shape)
