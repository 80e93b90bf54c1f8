"""Three memories that kernel tests run on: NumPy arrays go in, NumPy arrays come out.

    def test_doubles(kernel_memory):
        m = kernel_memory
        x, y = m.put(np.arange(5, dtype=np.float32)), m.poisoned((5,), "float32")
        double[(1,)](x, y, 5, BLOCK=8)
        m.sync()
        np.testing.assert_array_equal(m.get(y), ...)

`interpreter` is Paddle on the CPU under Triton's interpreter, `torch` is CUDA memory without
Paddle, `rig` is Paddle in CUDA memory through the test plug-in. bfloat16 goes in and comes out as
uint16 bits, float8 as uint8 bits. A memory imports its framework when it is opened.
"""

from __future__ import annotations

import ctypes
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from fd_dsa.triton_runtime import INTERPRETING

POISON = 0xA5
"""Every byte of memory that a kernel is to fill; no type reads it as NaN, zero or a small count."""

# of float32 and of the second of two bfloat16, and large as an int
SIGNALLING_NAN = bytes((POISON, POISON, POISON, 0x7F))

# types which NumPy lacks -> the type that carries their bits
BITS_OF = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}


class KernelMemory(ABC):
    """Memory of the arrays of a kernel test.

    Attributes:
        name: "interpreter", "torch" or "rig".
        large: True on a GPU: tests then add the sizes of real serving. FD_DSA_SMALL_TESTS=1 leaves
            them out, for a first look or under a memory checker.
    """

    name: str
    on_gpu: bool

    @property
    def large(self) -> bool:
        return self.on_gpu and os.environ.get("FD_DSA_SMALL_TESTS") != "1"

    def put(self, array: Any, dtype: str | None = None) -> Any:
        """A tensor of this memory with the values of `array`, a copy.

        Args:
            array: what NumPy takes; bits for the types that NumPy lacks.
            dtype: "bfloat16" (of uint16), "float8_e4m3fn" (of uint8), or a NumPy type to convert
                to; None keeps the array's own.
        """
        if dtype in BITS_OF:
            bits = np.ascontiguousarray(array)
            assert bits.dtype == BITS_OF[dtype], f"{dtype} is put as {BITS_OF[dtype]} bits"
            return self._reinterpret(self._from_numpy(bits), dtype)
        return self._from_numpy(np.ascontiguousarray(array, dtype))

    def poisoned(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor whose every byte is POISON, for a kernel to fill."""
        plain = np.dtype(BITS_OF.get(dtype, dtype))
        size = math.prod(shape) * plain.itemsize
        array = np.full(size, POISON, np.uint8).view(plain).reshape(shape)
        return self.put(array, dtype)

    def get(self, tensor: Any) -> np.ndarray:
        """The values of a tensor as a new NumPy array, after all work in flight."""
        self.sync()
        bits = BITS_OF.get(str(tensor.dtype).rpartition(".")[2])
        plain = tensor.contiguous()
        if bits:
            # the frameworks have no common unsigned 16-bit type
            plain = self._reinterpret(plain, bits.replace("uint16", "int16"))
        array = np.array(self._to_numpy(plain))
        return array.view(bits) if bits else array

    @abstractmethod
    def sync(self) -> None:
        """Wait until the device has done all its work."""

    @abstractmethod
    def _from_numpy(self, array: np.ndarray) -> Any:
        """A tensor with a copy of a contiguous array."""

    @abstractmethod
    def _to_numpy(self, tensor: Any) -> np.ndarray:
        """The values of a contiguous tensor of a type that NumPy has."""

    @abstractmethod
    def _reinterpret(self, tensor: Any, dtype: str) -> Any:
        """The same bytes as another type of the same width."""


class PaddleMemory(KernelMemory):
    """Paddle tensors in one place: the CPU's, or that of the test plug-in."""

    def __init__(self, name: str, place: Any, *, on_gpu: bool) -> None:
        self.name, self.on_gpu, self._place = name, on_gpu, place

    def sync(self) -> None:
        import paddle

        if not self._place.is_cpu_place():
            paddle.device.synchronize(self._place)

    def _from_numpy(self, array: np.ndarray) -> Any:
        import paddle

        if array.dtype == np.uint16:
            # Paddle would take unsigned 16-bit numbers for bfloat16
            array = array.view(np.int16)
        return paddle.to_tensor(array, place=self._place)

    def _to_numpy(self, tensor: Any) -> np.ndarray:
        return tensor.numpy()

    def _reinterpret(self, tensor: Any, dtype: str) -> Any:
        return tensor.view(dtype)


class TorchMemory(KernelMemory):
    """torch tensors in CUDA memory; Paddle is not needed."""

    name = "torch"
    on_gpu = True

    def sync(self) -> None:
        import torch

        torch.cuda.synchronize()

    def _from_numpy(self, array: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(array.copy()).to("cuda")

    def _to_numpy(self, tensor: Any) -> np.ndarray:
        return tensor.cpu().numpy()

    def _reinterpret(self, tensor: Any, dtype: str) -> Any:
        import torch

        return tensor.view(getattr(torch, dtype))


@cache
def poison_results() -> None:
    """Fill the CPU's tensors of `paddle.empty`: what no kernel writes is the same in every run."""
    import paddle

    original = paddle.empty

    def empty(*args: Any, **kwargs: Any) -> Any:
        tensor = original(*args, **kwargs)
        if tensor.size and tensor.place.is_cpu_place():
            size = tensor.size * tensor.element_size()
            ctypes.memmove(tensor.data_ptr(), SIGNALLING_NAN * -(-size // 4), size)
        return tensor

    paddle.empty = empty


def _open_interpreter() -> KernelMemory:
    """Paddle on the CPU; only an interpreter process can launch on it."""
    if not INTERPRETING:
        pytest.skip("kernels are compiled in this process; set TRITON_INTERPRET=1 to interpret")
    if find_spec("paddle") is None:
        pytest.skip("not installed: paddle")
    import paddle

    return PaddleMemory("interpreter", paddle.CPUPlace(), on_gpu=False)


def _open_torch() -> KernelMemory:
    """CUDA memory of torch, known to the launcher from here on."""
    if INTERPRETING:
        pytest.skip("kernels are interpreted in this process; unset TRITON_INTERPRET")
    from benchmarks._torch_device import register

    register()
    return TorchMemory()


def _open_rig() -> KernelMemory:
    """Device memory of Paddle's test plug-in; host memory in its forms without a GPU."""
    from tests.gpu_rig import current

    rig = current()
    if rig is None:
        pytest.skip("this session has no test plug-in: make gpu-rig")
    return PaddleMemory("rig", rig.place, on_gpu=rig.is_real)


_OPEN = {"interpreter": _open_interpreter, "torch": _open_torch, "rig": _open_rig}


def open_memory(name: str) -> KernelMemory:
    """The memory of this name; skips the test with the reason where it is not there."""
    return _OPEN[name]()


@contextmanager
def ending_midway(m: KernelMemory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launch in the block is interrupted at its second program."""
    if m.on_gpu:
        pytest.skip("a launch on a GPU does not end midway, or its error ends the process")
    from triton.runtime.interpreter import interpreter_builder

    begin, programs = interpreter_builder.set_grid_idx, []

    def stopped(*index: int) -> None:
        programs.append(index)
        if len(programs) == 2:
            raise KeyboardInterrupt
        begin(*index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(interpreter_builder, "set_grid_idx", stopped)
        yield
