"""Float32 GEMMs on a CPU, by the C function `dnnl_sgemm` in Paddle's x86 wheels.

Paddle's own operator takes ten microseconds longer, mostly to wrap arrays as tensors. Its MKL is
limited to AVX2 on AMD processors. There oneDNN's function took a quarter to three quarters of the
time for 8 rows. For batches of small matrices it took a sixth to a half. Paddle's operator is used
if the wheel has no oneDNN, or if sums must have a fixed order.

oneDNN's kernel for AVX-512 moves the stack pointer into its workspace on the heap. A signal handler
on that stack would overwrite other memory. So handlers get a stack of their own.

Source: oneDNN's `dnnl_sgemm` (oneapi/dnnl/dnnl.h).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.environment import cpu_threads
from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import as_numpy, matmul, staged
from fd_dsa.ops.fixed_order import fixed_order, two_rows
from fd_dsa.ops.packed_weights import OneDNN, onednn

_INT, _FLOAT, _POINTER, _CHAR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_char
MIN_SGEMM_PRODUCTS = 1 << 19
"""Multiplications below which NumPy's GEMM is faster, because its BLAS uses one thread."""
MIN_PACKED_VALUES = 1 << 17
"""Minimum values of a weight that is packed."""
_FLOAT32, _ONE = np.dtype(np.float32), np.float32(1.0)


@cache
def load_libraries() -> tuple[Any, Any, Any] | None:
    """Load oneDNN and the OpenMP runtime that it runs on.

    Returns:
        `dnnl_sgemm`, `omp_set_num_threads` and the library; None if Paddle has no oneDNN.
    """
    import paddle

    folder = Path(paddle.__file__).parent / "libs"
    try:
        library = ctypes.CDLL(str(folder / "libdnnl.so.3"))
        function = library.dnnl_sgemm
        set_threads = ctypes.CDLL(str(folder / "libiomp5.so")).omp_set_num_threads
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_int
    sizes, matrix = (_INT, _INT, _INT), (_POINTER, _INT)
    function.argtypes = [_CHAR, _CHAR, *sizes, _FLOAT, *matrix, *matrix, _FLOAT, *matrix]
    return function, set_threads, library


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("address", _POINTER), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


_NO_STACK = 2
_stack_memory = ctypes.create_string_buffer(1 << 16)


def _separate_signal_stack() -> None:
    """Run Python's signal handlers on a stack of their own in the main thread.

    The main thread receives the signals of a process.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    before, change = _Stack(), ctypes.CDLL(None).sigaltstack
    change(None, ctypes.byref(before))
    if before.flags & _NO_STACK:
        stack = _Stack(ctypes.addressof(_stack_memory), 0, len(_stack_memory))
        change(ctypes.byref(stack), None)


class ThreadState(threading.local):
    """Thread-local `sgemm`, because OpenMP sets its number of threads for each calling thread.

    Attributes:
        sgemm: oneDNN's function, None if it is missing or sums must have a fixed order.
    """

    sgemm: Callable[..., int] | None

    def __getattr__(self, name: str) -> Any:
        """Bind `sgemm` in the thread's first GEMM, because that imports Paddle."""
        if name != "sgemm":
            raise AttributeError(name)
        self.sgemm, libraries = None, None if fixed_order() else load_libraries()
        if libraries is not None:
            self.sgemm, set_threads, _ = libraries
            _separate_signal_stack()
            threads = cpu_threads()
            if threads is not None:
                set_threads(threads)
        return self.sgemm


thread_state = ThreadState()


class HostMatrix:
    """Weight of a GEMM in host memory, or one weight for each head.

    Args:
        tensor: float32 [in, out] or [heads, in, out], a Paddle CPU tensor that never moves.
        transposed: True if the tensor is [out, in]. It is read in that order, without a copy.
    """

    __slots__ = (
        *("_address", "_few", "_leading", "_mode", "_operand", "_packed"),
        *("array", "in_width", "out_width", "tensor"),
    )

    def __init__(self, tensor: Any, *, transposed: bool = False) -> None:
        self.tensor, self.array = tensor, as_numpy(tensor)
        assert self.array.flags.c_contiguous and self.array.dtype == _FLOAT32
        rows, self._leading = self.array.shape[-2:]
        self._mode = b"T" if transposed else b"N"
        self.in_width, self.out_width = (
            (self._leading, rows) if transposed else (rows, self._leading)
        )
        self._address = _address(self.array)
        self._operand = self.array.T if transposed else self.array
        self._packed: tuple[OneDNN, Any] | None = None
        self._few = 0 if fixed_order() else MIN_SGEMM_PRODUCTS // max(1, rows * self._leading)

    def pack(self) -> None:
        """Reorder a large weight for oneDNN's kernels. It cannot be loaded again afterwards."""
        libraries = None if fixed_order() else load_libraries()
        if libraries is None or self.array.size < MIN_PACKED_VALUES or self._mode == b"T":
            return
        engine = onednn(libraries[2])
        memory = engine.pack(self.array)
        if memory is not None:
            self._packed, self._few = (engine, memory), 0

    def matmul(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Multiply x [num_tokens, in] by the weight: float32 [num_tokens, out].

        Args:
            x: float32, may be columns of wider rows.
            out: C-contiguous memory of the result; None allocates.

        Raises:
            ShapeError: x has another width.
        """
        num_tokens, width = x.shape
        if width != self.in_width:
            raise ShapeError(f"gemm: x has {width} columns, the weight takes {self.in_width}")
        if out is None:
            out = np.empty((num_tokens, self.out_width), np.float32)
        if num_tokens < self._few:
            return x.dot(self._operand, out)
        sgemm = thread_state.sgemm
        if sgemm is None:
            product = matmul(staged(x), self.tensor, transpose_y=self._mode == b"T")
            np.copyto(out, as_numpy(product))
            return out
        if x.dtype != _FLOAT32 or x.strides[1] != 4:
            x = np.ascontiguousarray(x, np.float32)
        if self._packed is not None:
            engine, memory = self._packed
            engine.matmul(x, out, ((memory, 0, num_tokens),))
            return out
        sgemm(
            *(b"N", self._mode, num_tokens, self.out_width, width, 1.0),
            *(x.__array_interface__["data"][0], max(x.strides[0] >> 2, width)),
            *(self._address, self._leading, 0.0),
            *(out.__array_interface__["data"][0], self.out_width),
        )
        return out

    def matmul_join_heads(self, x: np.ndarray, reader: HostMatrix) -> np.ndarray:
        """Multiply as `matmul_by_head`: [num_tokens, heads * out]."""
        return self.matmul_by_head(x).reshape(len(x), -1)

    @staticmethod
    def activated(gate_up: np.ndarray) -> np.ndarray:
        """Return silu(gate) * up of gate_up [num_tokens, 2 * in]."""
        width = gate_up.shape[1] // 2
        gate = gate_up[:, :width]
        activated = np.negative(gate)
        # exp(-x) may overflow to inf for very negative x, and x / inf is the correct 0
        with np.errstate(over="ignore"):
            np.exp(activated, out=activated)
        activated += _ONE
        np.divide(gate, activated, out=activated)
        activated *= gate_up[:, width:]
        return activated

    def matmul_by_head(self, x: np.ndarray) -> np.ndarray:
        """Multiply each head of x by its own weight: float32 [num_tokens, heads, out].

        Args:
            x: float32 [num_tokens, heads, in], may be a view whose last axis is contiguous.

        Returns:
            An array that may have gaps.

        Raises:
            ShapeError: x has other heads or another width.
        """
        num_tokens, heads, width = x.shape
        if (heads, width) != (len(self.array), self.in_width):
            raise ShapeError(f"gemm: x is {x.shape}, the weight {self.array.shape}")
        if num_tokens < self._few:
            return np.matmul(x.transpose(1, 0, 2), self.array).transpose(1, 0, 2)
        sgemm = thread_state.sgemm
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


def matmul_spans(
    x: np.ndarray, out: np.ndarray, spans: Sequence[tuple[HostMatrix, int, int]]
) -> None:
    """Multiply rows of `x` by weights of one size, each weight by rows of its own.

    Args:
        x: float32 [num_rows, in], each row contiguous.
        out: float32 [num_rows, out], C-contiguous memory of the results.
        spans: for each weight the weight, its first row and the end of its rows.
    """
    packed = spans[0][0]._packed
    # the attribute's first use sets the thread's number of processors
    if packed is None or thread_state.sgemm is None:
        for weight, start, end in spans:
            rows, result = x[start:end], out[start:end]
            if end - start < weight._few:
                rows.dot(weight._operand, result)
            else:
                weight.matmul(rows, out=result)
    else:
        # weights of one size have one packed order
        memories = [(w._packed[1], start, end) for w, start, end in spans]  # type: ignore[index]
        packed[0].matmul(x, out, memories)


def batched(x: np.ndarray, y: np.ndarray, *, transpose_y: bool = False) -> np.ndarray:
    """Multiply n pairs of matrices: float32 [n, rows, columns].

    NumPy may warn about values that are not finite.

    Args:
        x: float32 [n, rows, k].
        y: float32 [n, k, columns], C-contiguous or the first columns of wider rows.
        transpose_y: True if y is [n, columns, k].
    """
    count, rows, width = x.shape
    columns, leading = y.shape[1 if transpose_y else 2], y.strides[1] >> 2
    if rows * width * columns < MIN_SGEMM_PRODUCTS and not fixed_order():
        return np.matmul(x, y.transpose(0, 2, 1) if transpose_y else y)
    sgemm = thread_state.sgemm
    if sgemm is None:
        operand = as_tensor(np.ascontiguousarray(y))
        return as_numpy(matmul(staged(x), operand, transpose_y=transpose_y))
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
    return int(array.__array_interface__["data"][0])
