"""GEMMs with weights that are packed once, by the C API of oneDNN.

`dnnl_sgemm` copies a weight into the order of its kernels in every call. For few rows the copy is
most of the work. Packing was measured with AVX-512, one thread and a weight of 512 x 512 in memory.
It took the time down to 0.55 for 4 rows, and to 0.7 for 16 rows. From 64 rows on it changes little.

Source: oneDNN 3, oneapi/dnnl/dnnl.h, `dnnl_matmul`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

import numpy as np

_INT, _POINTER = ctypes.c_int, ctypes.c_void_p
_SIZES = ctypes.c_int64 * 12
_CPU, _IN_ORDER, _FLOAT32, _ANY = 1, 1, 3, 1
_SOURCE, _TARGET, _WEIGHT = 1, 17, 33
_QUERY_NAME, _QUERY_WEIGHT = 8, 131
# name of the kernels for which packing was measured
_KERNELS = b"avx512"
# rows for which the order is chosen, and rows that a kernel is made for; see `_pieces`
_ROWS, _MANY_ROWS = 16, 64


class _Argument(ctypes.Structure):
    """Memory of a call and its purpose, `dnnl_exec_arg_t`."""

    _fields_ = (("purpose", _INT), ("memory", _POINTER))


class _Calls(threading.local):
    """GEMMs of a thread, by shape: the primitive, two memories and the arguments."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int, int, int], tuple[Any, Any, Any, Any]] = {}


class OneDNN:
    """Engine and stream of oneDNN in this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library, self._calls = library, _Calls()
        self._orders: dict[tuple[int, int], Any] = {}
        library.dnnl_primitive_desc_query_md.restype = _POINTER
        library.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        library.dnnl_memory_set_data_handle.argtypes = [_POINTER, _POINTER]
        library.dnnl_primitive_execute.argtypes = [_POINTER, _POINTER, _INT, _POINTER]
        self._engine = self._make("engine_create", _CPU, ctypes.c_size_t(0))
        self._stream = self._make("stream_create", self._engine, _IN_ORDER)

    def _make(self, name: str, *args: object) -> Any:
        """Call a function that creates an object, and return the object."""
        made = _POINTER()
        status = getattr(self._library, f"dnnl_{name}")(ctypes.byref(made), *args)
        if status:
            raise RuntimeError(f"oneDNN: {name} failed with status {status}")
        return made

    def _matrix(self, rows: int, columns: int, stride: int) -> Any:
        sizes, strides = _SIZES(rows, columns), _SIZES(stride, 1)
        return self._make("memory_desc_create_with_strides", 2, sizes, _FLOAT32, strides)

    def _gemm(self, x: object, weight: object, out: object) -> Any:
        return self._make("matmul_primitive_desc_create", self._engine, x, weight, None, out, None)

    def _order(self, rows: int, columns: int) -> Any:
        """Return the layout of a packed weight [rows, columns], None if packing is not measured."""
        if (rows, columns) not in self._orders:
            any_order = self._make(
                "memory_desc_create_with_tag", 2, _SIZES(rows, columns), _FLOAT32, _ANY
            )
            x, out = self._matrix(_ROWS, rows, rows), self._matrix(_ROWS, columns, columns)
            gemm, name = self._gemm(x, any_order, out), ctypes.c_char_p()
            self._library.dnnl_primitive_desc_query(gemm, _QUERY_NAME, 0, ctypes.byref(name))
            order = _POINTER(self._library.dnnl_primitive_desc_query_md(gemm, _QUERY_WEIGHT, 0))
            size = self._library.dnnl_memory_desc_get_size(order)
            fits = _KERNELS in (name.value or b"") and size == 4 * rows * columns
            self._orders[rows, columns] = order if fits else None
        return self._orders[rows, columns]

    def pack(self, array: np.ndarray) -> Any:
        """Pack a weight [in, out] in its own memory.

        Returns:
            The memory for `matmul`; None if the array is unchanged.
        """
        rows, columns = array.shape
        order = self._order(rows, columns)
        if order is None:
            return None
        plain, source = array.copy(), self._matrix(rows, columns, columns)
        memory = self._memory(order, array)
        reorder = self._make(
            "reorder_primitive_desc_create", source, self._engine, order, self._engine, None
        )
        arguments = (_Argument * 2)(
            _Argument(_SOURCE, self._memory(source, plain)), _Argument(_TARGET, memory)
        )
        primitive = self._make("primitive_create", reorder)
        self._library.dnnl_primitive_execute(primitive, self._stream, 2, arguments)
        self._library.dnnl_stream_wait(self._stream)
        return memory

    def _memory(self, description: object, array: np.ndarray | None = None) -> Any:
        """Wrap an array as memory of oneDNN. Without an array each call sets the address."""
        address = 0 if array is None else array.ctypes.data
        return self._make("memory_create", description, self._engine, _POINTER(address))

    def matmul(
        self, x: np.ndarray, out: np.ndarray, spans: Iterable[tuple[object, int, int]]
    ) -> None:
        """Multiply rows of x by packed weights.

        Args:
            x: float32 [num_rows, in], each row contiguous.
            out: float32 [num_rows, out], memory of the result.
            spans: for each weight its memory, its first row and the end of its rows.
        """
        width, columns, made = x.shape[1], out.shape[1], self._calls.made
        stride = max(x.strides[0] >> 2, width)
        source, target = x.__array_interface__["data"][0], out.__array_interface__["data"][0]
        set_address = self._library.dnnl_memory_set_data_handle
        execute, stream = self._library.dnnl_primitive_execute, self._stream
        for memory, start, end in spans:
            for rows in _pieces(end - start):
                key = rows, stride, width, columns
                call = made.get(key)
                if call is None:
                    call = made[key] = self._new_call(*key)
                primitive, source_memory, target_memory, arguments = call
                set_address(source_memory, source + 4 * start * stride)
                set_address(target_memory, target + 4 * start * columns)
                arguments[1].memory = memory
                execute(primitive, stream, 3, arguments)
                start += rows

    def _new_call(self, rows: int, stride: int, width: int, columns: int) -> Any:
        """Make the GEMM of a shape. Each call sets its operands."""
        x, out = self._matrix(rows, width, stride), self._matrix(rows, columns, columns)
        gemm = self._gemm(x, self._orders[width, columns], out)
        primitive = self._make("primitive_create", gemm)
        source, target = self._memory(x), self._memory(out)
        arguments = (_Argument * 3)(
            _Argument(_SOURCE, source), _Argument(_WEIGHT, None), _Argument(_TARGET, target)
        )
        return primitive, source, target, arguments


@lru_cache(1 << 12)
def _pieces(rows: int) -> tuple[int, ...]:
    """Split rows into up to three counts, so that few distinct counts occur.

    Each count has a kernel of its own, and a kernel takes a quarter of a MiB.
    """
    many, few = rows - rows % _MANY_ROWS, rows % _MANY_ROWS
    return tuple(filter(None, (many, few - few % _ROWS, few % _ROWS)))


@cache
def onednn(library: ctypes.CDLL) -> OneDNN:
    """Return the engine of a loaded oneDNN, one for each process."""
    return OneDNN(library)
