"""cuBLASLt as a library that takes notes, on a fake device."""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.ops.cublaslt import Cublaslt
from tests.ops.block_fp8 import row_values, weight_values
from tests.triton_runtime.fakes import FakeApi, FakeLibrary

WORKSPACE = 32 << 20


@dataclass(frozen=True)
class Tensor:
    """Address with a shape, which cuBLASLt gets and does not read."""

    address: int
    shape: tuple[int, ...]
    dtype: str = "fake.bfloat16"
    step: int = 0
    device: int = 0

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, ...]:
        return (self.step or self.shape[-1], 1)[-len(self.shape) :]

    def is_contiguous(self) -> bool:
        return not self.step


class Driver(FakeLibrary):
    """The driver's calls around a GEMM.

    Attributes:
        capturing: every stream is captured.
        milliseconds: what the next timed rounds take.
    """

    def __init__(self, num_devices: int = 1) -> None:
        super().__init__(num_devices=num_devices)
        self.capturing, self.milliseconds = False, iter(())

    def cuStreamIsCapturing(self, stream: Any, status: Any) -> int:
        status._obj.value = int(self.capturing)
        return 0

    def cuEventElapsedTime(self, elapsed: Any, begin: Any, end: Any) -> int:
        elapsed._obj.value = next(self.milliseconds)
        return 0


class Blas:
    """cuBLASLt's functions, which take notes.

    Attributes:
        layouts: handle -> type, rows, columns and step.
        attributes: handle and number -> value.
        computes: types of computing and of factors, of each description.
        launches: descriptions of the GEMMs, in order.
        statuses: function -> what it returns from now on.
        num_algorithms: what the heuristic finds; the number of each is its first word.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver, self.calls, self.statuses = driver, Counter[str](), dict[str, int]()
        self.layouts: dict[int, tuple[int, ...]] = {}
        self.attributes: dict[tuple[int, int], int] = {}
        self.launches: list[dict[str, Any]] = []
        self.computes: list[tuple[Any, ...]] = []
        self.num_algorithms, self._made = 3, 0x100

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cublasLt"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls[name] += 1
            status = self.statuses.get(name, 0)
            if not status:
                self._do(name, arguments)
            return status

        return call

    def cublasLtGetVersion(self) -> int:
        return 130100

    def cublasLtGetStatusName(self, status: int) -> bytes:
        return f"CUBLAS_STATUS_{status}".encode()

    def _do(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name.endswith("Create"):
            self._made += 1
            arguments[0]._obj.value = self._made
        if name == "cublasLtMatmulDescCreate":
            self.computes.append(arguments[1:])
        elif name == "cublasLtMatrixLayoutCreate":
            self.layouts[self._made] = arguments[1], *(n.value for n in arguments[2:])
        elif name.endswith("SetAttribute"):
            owner, number, value, size = arguments
            assert size.value == ctypes.sizeof(value._obj)
            self.attributes[owner.value, number] = value._obj.value
        elif name == "cublasLtMatmulAlgoGetHeuristic":
            *_, wanted, found, count = arguments
            count._obj.value = min(wanted, self.num_algorithms)
            for number in range(count._obj.value):
                found[number].algorithm[0] = number
        elif name == "cublasLtMatmul":
            self._matmul(*arguments)

    def _matmul(self, handle: Any, operation: Any, *arguments: Any) -> None:
        one, a, a_layout, b, b_layout, zero, c, c_layout, d, d_layout, *rest = arguments
        algorithm, workspace, size, stream = rest
        assert (one._obj.value, zero._obj.value, size.value) == (1.0, 0.0, WORKSPACE)
        assert c is d and c_layout is d_layout
        own = {k: v for (owner, k), v in self.attributes.items() if owner == operation.value}
        # byref with an offset hides its own address: the structure after it is read
        place = ctypes.cast(algorithm, ctypes.POINTER(ctypes.c_uint64))
        self.launches.append(
            {
                "addresses": (a.value, b.value, d.value),
                "layouts": [self.layouts[m.value] for m in (a_layout, b_layout, d_layout)],
                "attributes": own,
                "algorithm": place[0],
                "workspace": workspace.value,
                "stream": stream.value,
                "context": self.driver.context(),
            }
        )


class MultiplyingBlas(Blas):
    """The functions on host memory, which multiply in FP8, column by column as cuBLASLt reads."""

    def _matmul(self, *arguments: Any) -> None:
        super()._matmul(*arguments)
        note = self.launches[-1]
        weight, x, out = map(_columns, note["addresses"], note["layouts"])
        blocks = -(-len(weight) // 128), weight.shape[1] // 128
        scales = note["attributes"][17], note["attributes"][18]
        scales_w = _columns(scales[0], (0, *blocks[::-1], blocks[1]))
        scales_x = _columns(scales[1], (0, len(x), blocks[1], len(x)))
        # padding rows hold any codes and scales
        with np.errstate(over="ignore", invalid="ignore"):
            sums = row_values(x, scales_x) @ weight_values(weight, scales_w).T
            out[...] = bfloat16_bits(sums.astype(np.float32))


def _columns(address: int, layout: tuple[int, ...]) -> np.ndarray:
    """Columns of a layout in host memory, as rows of an array."""
    kind, rows, columns, step = layout
    number = {0: ctypes.c_float, 14: ctypes.c_uint16, 28: ctypes.c_uint8}[kind]
    memory = (number * (step * (columns - 1) + rows)).from_address(address)
    flat = np.ctypeslib.as_array(memory)
    return np.lib.stride_tricks.as_strided(
        flat, (columns, rows), (step * flat.itemsize, flat.itemsize)
    )


class Bench:
    """cuBLASLt on a fake device, with its library, its driver and its memory."""

    def __init__(self, driver: Driver, device: int = 0, blas: type[Blas] = Blas) -> None:
        self.driver, self.blas, self.api = driver, blas(driver), FakeApi(stream=7)
        self.allocated: list[Tensor] = []
        self.lt = Cublaslt(self.api, device, self.allocate, self.blas)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        self.allocated.append(Tensor(0x100000 * (1 + len(self.allocated)), shape, f"fake.{dtype}"))
        return self.allocated[-1]
