"""Kernels in Triton's interpreter, launched like compiled ones, and two repairs of it.

* `range` with a bound known only at run time fails from NumPy 2.4 on (Triton up to 3.8).
* `tl.dot` multiplies the raw 16-bit patterns of bfloat16 operands.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from fd_dsa.errors import BackendUnavailable
from fd_dsa.triton_runtime.compiler import Argument, Compiled, argument_codes
from fd_dsa.triton_runtime.driver import cuda
from fd_dsa.triton_runtime.launch import Variant
from fd_dsa.triton_runtime.parameters import Signature

import triton  # isort: skip
from triton.language import core  # isort: skip

# the interpreter keeps its state (program ids, patched language) in module globals
_LOCK = threading.RLock()
ON_FAILURE: list[Callable[[], None]] = []
"""Functions that repair memory after a launch that ended midway, before another one begins.

Only an interpreted launch ends midway. A GPU runs a launch to its end, or the error ends the use of
the device.
"""


@triton.jit
def no_instruction():
    """Do nothing, in place of an instruction that the interpreter or Triton lacks."""


class InterpretedVariant(Variant):
    """Kernel that Triton's interpreter runs, packed and launched like a compiled one.

    Raises:
        BackendUnavailable: the kernel was decorated after Triton had been loaded to compile.
    """

    def __init__(
        self,
        fn: Any,
        signature: Signature,
        arguments: Mapping[str, Argument],
        options: Mapping[str, object],
    ) -> None:
        if not hasattr(fn, "rewrite"):
            raise BackendUnavailable(
                f"kernel {signature.kernel} was made by triton.jit in a process that had loaded "
                "Triton for compiling; set TRITON_INTERPRET=1 before the first import of triton"
            )
        compiled = Compiled(signature.kernel, b"", "", 0, 1, argument_codes(arguments))
        super().__init__(signature, arguments, options, compiled, 0, 0, cuda())
        self._fn, self.enqueue = fn, self._run
        self._constants = {name: argument.value for name, argument in arguments.items()}
        # Triton's type of each tensor
        self._elements = [arguments[p.name].type[1:] for p in self.tensors]

    def _run(self, config: ctypes.c_void_p, *_: object) -> int:
        """Run the kernel on the memory of a launch, of which the configuration is a part."""
        start = (config.value or 0) - self.grid_offset
        *passed, x, y, z = self.values.unpack(ctypes.string_at(start, self.values.size))
        count = len(self._elements)
        pointers = map(_pointer, self._elements, passed[:count])
        names = [p.name for p in self.tensors + self.numbers]
        values = self._constants | dict(zip(names, [*pointers, *passed[count:]], strict=True))
        run(self._fn, (x, y, z), values)
        return 0


@cache
def _pointer_type(element: str) -> Any:
    prefix = {"i": "int", "u": "uint"}.get(element[0])
    return core.pointer_type(core.dtype(prefix + element[1:] if prefix else element))


def _pointer(element: str, address: int) -> Any:
    """Return an address in the form that the interpreter holds it in."""
    from triton.runtime.interpreter import TensorHandle

    kind = _pointer_type(element)
    place = np.array([cuda().library.host_address(address)], np.uint64)
    return core.tensor(TensorHandle(place, kind), kind)


def run(fn: Any, grid: tuple[int, ...], values: Mapping[str, object]) -> None:
    """Run an interpreted kernel on every program of the grid, in order.

    Args:
        fn: result of `triton.jit` for the kernel, in an interpreting process.
        grid: one to three numbers of programs.
        values: values of all parameters, in order.
    """
    # a GPU does not warn, and padding may hold any bits, such as rows of NaN
    with _LOCK, warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        repair()
        try:
            fn.run(*values.values(), grid=grid, warmup=False)
        except BaseException:
            for repair_memory in ON_FAILURE:
                repair_memory()
            raise


@cache
def repair() -> None:
    """Make the repairs. Only the first call of the process does."""
    from triton.runtime import interpreter

    _patch_index(interpreter)
    _patch_dot(interpreter)


def _patch_index(interpreter: Any) -> None:
    """Make `range` convert its bound by `.item()`."""
    # the interpreter sets its own conversion in every launch
    original = interpreter._patch_lang_tensor

    def index(self: Any) -> int:
        return int(self.handle.data.item())

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched


def _patch_dot(interpreter: Any) -> None:
    """Widen bfloat16 operands to float32, exactly, before the multiplication."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != core.bfloat16 or handle.data.dtype != np.uint16:
            return handle
        bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), core.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    builder.create_dot = create_dot
