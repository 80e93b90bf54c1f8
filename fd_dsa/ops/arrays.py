"""Arrays of operators: views across NumPy and Paddle, checks, new memory, reused memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt

from fd_dsa.cache_formats import FORMAT_OF_DTYPE, CacheFormat
from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.tensor import Array, Normed, Tensor

_MIN_WIDTH = 64
ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, Tensor)


def as_numpy(array: Array) -> np.ndarray:
    """Return a NumPy view of an array or a Paddle CPU tensor. Writes reach the same memory."""
    if isinstance(array, np.ndarray):
        return array
    view = np.from_dlpack(array)  # type: ignore[arg-type]  # Paddle's method takes no arguments
    if view.flags.writeable:
        return view
    # with NumPy before 2.2.5, or Paddle before 3.3, views of tensors are read-only
    address, _ = view.__array_interface__["data"]
    interface = view.__array_interface__ | {"data": (address, False)}
    # NumPy keeps a reference to this object, which keeps the tensor alive
    return np.asarray(SimpleNamespace(__array_interface__=interface, view=view))


def on_device(array: Array) -> TypeGuard[Tensor]:
    """Return True for a tensor in device memory, False for arrays and Paddle CPU tensors."""
    return not isinstance(array, np.ndarray) and not array.place.is_cpu_place()


def allocator_beside(tensor: Tensor) -> Callable[[tuple[int, ...], str], Tensor]:
    """Return an allocator of uninitialised Paddle tensors on the device of a tensor."""
    import paddle

    place = tensor.place
    return lambda shape, dtype: paddle.empty(list(shape), dtype, device=place)


def readable(tensor: Tensor) -> Array:
    """Return a parameter as operators read it: a NumPy view on a CPU, the tensor on a device."""
    tensor = tensor.detach()
    return tensor if on_device(tensor) else as_numpy(tensor)


def matmul(x: Tensor, y: Tensor, *, transpose_y: bool = False) -> Tensor:
    """Multiply two Paddle tensors. The first call imports Paddle."""
    import paddle

    return paddle.matmul(x, y, transpose_y=transpose_y)


def rows_at(x: Any, index: Any) -> Any:
    """Return rows `index`, integers [n], of x [num_rows, ...]."""
    if isinstance(x, np.ndarray):
        return x[as_numpy(index)]
    # imported only if there is a device, because it loads kernels
    from fd_dsa.ops import dense_kernels

    return dense_kernels.rows_at(x, index)


def values_of(x: ArrayOrTensor | Normed) -> ArrayOrTensor | Tensor:
    """Return the values of activations, without the FP8 form that a norm on a device adds."""
    return x.plain if isinstance(x, Normed) else x


def rounded_length(length: int, max_length: int) -> int:
    """Return the next power of two, at least 64 and at most `max_length`.

    Rows of scores and of slots have these widths, so buffers have few views, and kernels few forms.
    """
    return min(max(_MIN_WIDTH, 1 << max(length - 1, 0).bit_length()), max_length)


def check_shape(
    operator: str, argument: str, value: object, allowed: tuple[int | None, ...]
) -> None:
    """Raise ShapeError unless `value` is an array of the shape `allowed` (None = any extent)."""
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
"""Names of the dtypes that a cache may have."""


def cache_format(cache: Array) -> CacheFormat:
    """Return the format of a cache whose dtype is one of `CACHE_DTYPES`."""
    return FORMAT_OF_DTYPE[dtype_name(cache.dtype)]


@cache
def dtype_name(dtype: object) -> str:
    """Return the name of a dtype without its package.

    The names are cached, because making one takes longer than a small sum.
    """
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
    """Check the shape and the dtype of one argument, in about a microsecond."""
    check_shape(operator, argument, value, shape)
    check_dtype(operator, argument, value, dtypes)


def check_rope(
    operator: str, position_ids: Array | None, cos_sin_cache: Array, num_tokens: int, width: int
) -> None:
    """Check a table of cos and sin and the positions that select its rows.

    Args:
        position_ids: int64 [num_tokens], rows of the table; None = row t belongs to token t.
        cos_sin_cache: float32 [num_positions or num_tokens, rope_dim].
        num_tokens: tokens of the step.
        width: values of a row that is rotated, at least rope_dim.

    Raises:
        ShapeError, DtypeError: an argument is not as above.
    """
    rows = num_tokens if position_ids is None else None
    if position_ids is not None:
        check_array(operator, "position_ids", position_ids, (num_tokens,), ("int64",))
    check_array(operator, "cos_sin_cache", cos_sin_cache, (rows, None), ("float32",))
    num_rows, rope_dim = cos_sin_cache.shape
    if rows is None and num_rows == 0:
        raise ShapeError(f"{operator}: cos_sin_cache is empty, allowed is a row for each position")
    if rope_dim % 2 or not 0 < rope_dim <= width:
        raise ShapeError(
            f"{operator}: cos_sin_cache has rows of {rope_dim} values, allowed are even numbers "
            f"from 2 to {width}"
        )


def outer_strides(operator: str, argument: str, tensor: Tensor) -> list[int]:
    """Return the strides of a device tensor, in values, for all axes except the last.

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
    """Raise ValueError unless all `values` are in [low, stop). The check reads every value."""
    if values.size == 0 or (values.min() >= low and values.max() < stop):
        return
    place = tuple(int(i) for i in np.argwhere((values < low) | (values >= stop))[0])
    index = ", ".join(map(str, place))
    raise ValueError(
        f"{operator}: {argument}[{index}] is {values[place]}, allowed is {low} to {stop - 1}"
    )


def check_writable(operator: str, argument: str, value: Array) -> None:
    """Raise ValueError if `value`, a CPU tensor or a NumPy array, is read-only."""
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
    """Return the memory of an operator's result: `out` after a check, or a new array.

    Args:
        out: memory that the caller gives; None allocates.
        beside: an argument of the operator, whose library and place a new array gets.
        shape: shape of the result. If `fill` is given, the last extent of `out` may be larger.
        dtype: dtype of the result.
        fill: value of all elements of a new array; None = uninitialised.

    Raises:
        ShapeError, DtypeError, ValueError: `out` has another shape or dtype, has gaps between its
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
# 256 KiB; larger operands are not copied
_STAGED_VALUES = 1 << 16


class _Stage(threading.local):
    """Memory of one thread for operands of GEMMs, with an array and a tensor for each shape."""

    def __init__(self) -> None:
        self.buffer = np.empty(_STAGED_VALUES, np.float32)
        self.views: dict[tuple[int, ...], tuple[np.ndarray, Any]] = {}


_stage = _Stage()


def staged(x: np.ndarray) -> Tensor:
    """Return a tensor with the values of `x`, valid until the thread calls this again.

    A new tensor costs more than a small GEMM, and a copy of a few rows costs less. So the values
    are copied to memory that already has a tensor.
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
    """Named buffers that are reused by every step and grow as needed.

    Page faults of new memory of this size cost more than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Any], np.ndarray] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32
    ) -> np.ndarray:
        """Return an uninitialised C-contiguous array, valid until the name is taken again."""
        size, key = math.prod(shape), (name, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            buffer = np.empty(max(size, 1), dtype)
            self._buffers[key] = buffer
        return buffer[:size].reshape(shape)
