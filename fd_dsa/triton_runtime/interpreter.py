"""Kernels in Triton's interpreter, launched as compiled ones are; it is repaired and made faster.

Two repairs:

* `range` with a bound known only at run time fails from NumPy 2.4 on (Triton up to 3.8);
* `tl.dot` multiplies the raw 16-bit patterns of bfloat16 operands.

The interpreter also replaces the language's functions with its own at every call of a device
function (`tl.sum` and `tl.zeros` are two), builds its table of NumPy's types at every look-up, and
looks for integer overflows that it does not report: most of the time of many kernels. Here a launch
does the first once, a process does the second once, and the third is left out.

Every operation makes a block type and a tensor, and both make a new shape, which is a tuple of the
language with a type and a name of its own: half the time of a kernel of small blocks. A shape gives
the same objects each time, and nothing changes them; so they are shared.
"""

from __future__ import annotations

import ctypes
import inspect
import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from fd_dsa.errors import BackendUnavailable
from fd_dsa.triton_runtime.compiler import Argument, Compiled, argument_codes
from fd_dsa.triton_runtime.driver import cuda
from fd_dsa.triton_runtime.parameters import Signature
from fd_dsa.triton_runtime.variant import Variant

import triton  # isort: skip
from triton.language import core  # isort: skip

# the interpreter keeps its state (program ids, patched language) in module globals
_LOCK = threading.RLock()
# modules of the language that the launch in progress has made the interpreter's; None between two
_patched: set[str] | None = None


class InterpretedVariant(Variant):
    """A kernel that Triton's interpreter runs: packed and launched like a compiled one.

    Raises:
        BackendUnavailable: the kernel was decorated after Triton had been loaded to compile.
    """

    def __init__(
        self,
        fn: Any,
        signature: Signature,
        arguments: Mapping[str, Argument],
        options: Mapping[str, Any],
    ) -> None:
        if not hasattr(fn, "rewrite"):
            raise BackendUnavailable(
                f"kernel {signature.kernel} was made by triton.jit in a process that had loaded "
                "Triton for compiling; set TRITON_INTERPRET=1 before the first import of triton"
            )
        compiled = Compiled(signature.kernel, b"", "", 0, 1, 1, argument_codes(arguments))
        super().__init__(signature, arguments, options, compiled, 0, 0, cuda())
        self._fn, self.queue = fn, self._run

    def _run(self, config: ctypes.c_void_p, *_: Any) -> int:
        """Run the kernel on the values of a frame, of which the configuration is a part."""
        start = (config.value or 0) - self.grid_offset
        *passed, x, y, z = self.values.unpack(ctypes.string_at(start, self.values.size))
        values = {name: argument.value for name, argument in self.arguments.items()}
        for parameter, value in zip(self.passed, passed, strict=True):
            kind = self.arguments[parameter.name].type
            values[parameter.name] = _pointer(kind[1:], value) if kind[0] == "*" else value
        run(self._fn, (x, y, z), values)
        return 0


@cache
def _pointer_type(element: str) -> Any:
    """The language's type of an address."""
    prefix = {"i": "int", "u": "uint"}.get(element[0])
    return core.pointer_type(core.dtype(prefix + element[1:] if prefix else element))


def _pointer(element: str, address: int) -> Any:
    """An address as the interpreter holds it."""
    from triton.runtime.interpreter import TensorHandle

    kind = _pointer_type(element)
    place = np.array([cuda().library.host_address(address)], np.uint64)
    return core.tensor(TensorHandle(place, kind), kind)


def run(fn: Any, grid: tuple[int, ...], values: Mapping[str, Any]) -> None:
    """Run an interpreted kernel on every program of the grid, in order.

    Args:
        fn: what `triton.jit` made of the kernel in an interpreting process.
        grid: one to three numbers of programs.
        values: of all parameters, in order.
    """
    global _patched
    with _LOCK, warnings.catch_warnings():
        # NumPy's warning about a maximum of NaN alone, which padding may hold
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        repair()
        _patched = set()
        try:
            fn.run(*values.values(), grid=grid, warmup=False)
        finally:
            _patched = None


@cache
def repair() -> None:
    """Make the repairs and spare the repeated work, once a process."""
    from triton.runtime import interpreter

    _patch_index(interpreter)
    _patch_dot(interpreter)
    _patch_once_a_launch(interpreter)
    _patch_types(interpreter)
    _leave_out_silent_checks(interpreter.interpreter_builder)
    # another release's classes, which set other attributes, are left alone
    block = core.block_type(core.float32, [2, 4])
    if set(vars(block)) == {"element_ty", "shape", "numel", "name"}:
        _remember_types()
    if set(vars(core.tensor(None, block))) == {"handle", "shape", "numel", "type", "dtype"}:
        _remember_tensors()


def _patch_once_a_launch(interpreter: Any) -> None:
    """Leave out what a launch has already put in place of the language's functions."""
    original = interpreter._patch_lang

    @cache
    def languages(fn: Any) -> frozenset[str]:
        """Modules of the language that a function sees, which are what is patched for it."""
        seen = (value for value in fn.__globals__.values() if inspect.ismodule(value))
        return frozenset(module.__name__ for module in seen if module in (core, triton.language))

    def patch_lang(fn: Any) -> Any:
        if _patched is None:
            return original(fn)
        modules = languages(fn)
        # a function that sees none is refused by the original
        if modules and modules <= _patched:
            return None
        _patched.update(modules)
        return original(fn)

    interpreter._patch_lang = patch_lang


def _patch_types(interpreter: Any) -> None:
    """Remember which type of NumPy holds a scalar, pointer or the elements of a block."""
    original = interpreter._get_np_dtype
    known: dict[str, np.dtype[Any]] = {}

    def get_np_dtype(dtype: Any) -> np.dtype[Any]:
        name = dtype.scalar.name
        array_type = known.get(name)
        if array_type is None:
            array_type = known[name] = original(dtype)
        return array_type

    interpreter._get_np_dtype = get_np_dtype


def _leave_out_silent_checks(builder: Any) -> None:
    """Compute no overflow checks where `device_assert` does nothing, which is without `debug`."""
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def _patch_index(interpreter: Any) -> None:
    """Convert a bound of `range` by `.item()`; the interpreter's own is back at every launch."""
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


def _remember_types() -> None:
    """Shape, number of elements and name of a block type, by its elements and shape."""
    original = core.block_type.__init__
    known: dict[tuple[Any, ...], tuple[Any, Any, str]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if isinstance(shape, core.tuple) else shape
        key = (element_ty.name, *map(core._unwrap_if_constexpr, values))
        shared = known.get(key)
        if shared is None:
            original(self, element_ty, shape)
            known[key] = self.shape, self.numel, self.name
            return
        self.element_ty = element_ty
        self.shape, self.numel, self.name = shared

    core.block_type.__init__ = init


def _remember_tensors() -> None:
    """Shape and number of elements of a tensor, by the shape of its type."""
    original = core.tensor.__init__
    known: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        shared = known.get(key)
        if shared is None:
            original(self, handle, type)
            known[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shared

    core.tensor.__init__ = init
