"""Float32 GEMMs on a CPU, by a plain C function that Paddle's x86 wheels bring.

Paddle's own operator takes ten microseconds longer, most of it to wrap arrays as tensors, and its
MKL is capped at AVX2 on AMD processors: on one, oneDNN's function took a quarter to three quarters
of the time for 8 rows, and for batches of small matrices a sixth to a half. Without it, or where
one order of sums is asked for, the operator serves.

Source: oneDNN's `dnnl_sgemm` (oneapi/dnnl/dnnl.h).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.environment import cpu_threads
from fd_dsa.errors import ShapeError
from fd_dsa.ops._fixed_order import fixed_order, two_rows
from fd_dsa.ops._host import as_numpy, matmul, staged
from fd_dsa.step.host_tensor import as_tensor

_INT, _FLOAT, _POINTER, _CHAR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_char
# vectors of a batch up to which calling the C function for each is faster
_FEW_VECTORS = 4
_FLOAT32 = np.dtype(np.float32)


@cache
def _libraries() -> tuple[Any, Any] | None:
    """oneDNN's function and the OpenMP runtime that it runs on; None where Paddle has neither."""
    import paddle

    folder = Path(paddle.__file__).parent / "libs"
    try:
        function = ctypes.CDLL(str(folder / "libdnnl.so.3")).dnnl_sgemm
        set_threads = ctypes.CDLL(str(folder / "libiomp5.so")).omp_set_num_threads
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_int
    sizes, matrix = (_INT, _INT, _INT), (_POINTER, _INT)
    function.argtypes = [_CHAR, _CHAR, *sizes, _FLOAT, *matrix, *matrix, _FLOAT, *matrix]
    return function, set_threads


class _Thread(threading.local):
    """A thread's `sgemm`, None without one: OpenMP counts threads for each thread that calls it."""

    sgemm: Callable[..., int] | None

    def __getattr__(self, name: str) -> Any:
        """Bind it in the thread's first GEMM: Paddle is imported by that, not by this module."""
        if name != "sgemm":
            raise AttributeError(name)
        self.sgemm, libraries = None, None if fixed_order() else _libraries()
        if libraries is not None:
            self.sgemm, set_threads = libraries
            threads = cpu_threads()
            if threads is not None:
                set_threads(threads)
        return self.sgemm


_thread = _Thread()


class HostMatrix:
    """A weight in host memory, or one for each head, as GEMMs read it.

    Args:
        tensor: float32 [in, out] or [heads, in, out], a Paddle CPU tensor that never moves.
        transposed: the tensor is [out, in] and is read in that order: it is not copied.
    """

    __slots__ = ("_address", "_leading", "_mode", "array", "in_width", "out_width", "tensor")

    def __init__(self, tensor: Any, *, transposed: bool = False) -> None:
        self.tensor, self.array = tensor, as_numpy(tensor)
        assert self.array.flags.c_contiguous and self.array.dtype == _FLOAT32
        rows, self._leading = self.array.shape[-2:]
        self._mode = b"T" if transposed else b"N"
        self.in_width, self.out_width = (
            (self._leading, rows) if transposed else (rows, self._leading)
        )
        self._address = _address(self.array)

    def times(self, x: np.ndarray) -> np.ndarray:
        """x [num_tokens, in] times the weight: float32 [num_tokens, out], a new array.

        `x` may be columns of wider rows.

        Raises:
            ShapeError: `x` has another width.
        """
        num_tokens, width = x.shape
        if width != self.in_width:
            raise ShapeError(f"gemm: x has {width} columns, the weight takes {self.in_width}")
        sgemm = _thread.sgemm
        if sgemm is None:
            transpose_y = self._mode == b"T"
            return as_numpy(matmul(staged(x), self.tensor, transpose_y=transpose_y))
        if x.dtype != _FLOAT32 or x.strides[1] != 4:
            x = np.ascontiguousarray(x, np.float32)
        out = np.empty((num_tokens, self.out_width), np.float32)
        sgemm(
            *(b"N", self._mode, num_tokens, self.out_width, width, 1.0),
            *(x.__array_interface__["data"][0], max(x.strides[0] >> 2, width)),
            *(self._address, self._leading, 0.0),
            *(out.__array_interface__["data"][0], self.out_width),
        )
        return out

    def heads_joined(self, x: np.ndarray, reader: Any) -> np.ndarray:
        """`times_by_head`, the heads of a token side by side."""
        return self.times_by_head(x).reshape(len(x), -1)

    @staticmethod
    def activated(gate_up: np.ndarray) -> np.ndarray:
        """silu(gate) * up of [num_tokens, 2 * in] whose halves are gate and up."""
        width = gate_up.shape[1] // 2
        gate = gate_up[:, :width]
        # exp(-x) may overflow to inf for very negative x: x / inf is the right 0
        with np.errstate(over="ignore"):
            activated = np.exp(-gate)
        activated += np.float32(1.0)
        np.divide(gate, activated, out=activated)
        activated *= gate_up[:, width:]
        return activated

    def times_by_head(self, x: np.ndarray) -> np.ndarray:
        """Each head's own GEMM: x [num_tokens, heads, in] to float32 [num_tokens, heads, out].

        `x` may be a view whose last axis is contiguous; the result may not be contiguous.
        """
        sgemm = _thread.sgemm
        num_tokens, heads, width = x.shape
        if (heads, width) != (len(self.array), self.in_width):
            raise ShapeError(f"gemm: x is {x.shape}, the weight {self.array.shape}")
        if sgemm is None:
            by_head = x.transpose(1, 0, 2)
            rows = two_rows(by_head) if fixed_order() else by_head
            out = as_numpy(matmul(staged(rows), self.tensor))
            return out.transpose(1, 0, 2)[:num_tokens]
        if x.dtype != _FLOAT32 or x.strides[2] != 4:
            x = np.ascontiguousarray(x, np.float32)
        columns = self.out_width
        out = np.empty((num_tokens, heads, columns), np.float32)
        source, target, weight = _address(x), _address(out), self._address
        leading, step = max(x.strides[0] >> 2, width), x.strides[1]
        for _ in range(heads):
            sgemm(
                *(b"N", b"N", num_tokens, columns, width, 1.0, source, leading),
                *(weight, columns, 0.0, target, heads * columns),
            )
            source, target, weight = (
                source + step,
                target + 4 * columns,
                weight + 4 * width * columns,
            )
        return out


def batched(x: np.ndarray, y: np.ndarray, *, transpose_y: bool = False) -> np.ndarray:
    """Multiply n pairs of matrices: x [n, rows, k] by y [n, k, columns], float32.

    With `transpose_y` y is [n, columns, k]. y is C-contiguous, or the first columns of wider rows.
    The C function is called for each pair; many vectors times matrices run as one operator of
    Paddle.
    """
    sgemm, (count, rows, width) = _thread.sgemm, x.shape
    if sgemm is None or (rows == 1 and count > _FEW_VECTORS):
        y = as_tensor(np.ascontiguousarray(y))
        return as_numpy(matmul(staged(x), y, transpose_y=transpose_y))
    columns, leading = y.shape[1 if transpose_y else 2], y.strides[1] >> 2
    x = np.ascontiguousarray(x)
    out = np.empty((count, rows, columns), np.float32)
    mode = b"T" if transpose_y else b"N"
    source, factor, target = _address(x), _address(y), _address(out)
    for _ in range(count):
        sgemm(
            *(b"N", mode, rows, columns, width, 1.0, source, width),
            *(factor, leading, 0.0, target, columns),
        )
        source, target = source + 4 * rows * width, target + 4 * rows * columns
        factor += y.strides[0]
    return out


def _address(array: np.ndarray) -> int:
    """Where an array starts."""
    return int(array.__array_interface__["data"][0])
