"""Triton's interpreter on tensors of any library: three repairs, each made only where it fails.

* its host copy of the arguments uses torch's storages: other tensors are taken as they are;
* `range` with a bound known only at run time fails from NumPy 2.4 on (Triton up to 3.8);
* `tl.dot` multiplies the raw 16-bit patterns of bfloat16 operands.

It also replaces the language's functions with its own at every call of a device function (`tl.sum`
and `tl.zeros` are two), builds its table of NumPy's types at every look-up, and looks for integer
overflows that it does not report: most of the time of many kernels. Here a launch does the first
once, a process does the second once, and the third is left out. Shapes are remembered, see
`interpreter_shapes`.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from fd_dsa.triton_runtime.interpreter_shapes import remember_shapes

import triton.language as tl  # isort: skip

# the interpreter keeps its state (program ids, patched language) in module globals
_LOCK = threading.RLock()
_repaired = False
# modules of the language that the launch in progress has made the interpreter's; None between two
_patched: set[str] | None = None


def run(fn: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Run an interpreted kernel on every program of the grid, in order.

    Args:
        fn: what `triton.jit` made of the kernel in an interpreting process.
        grid: one to three numbers of programs.
        arguments: value of every parameter; tensors are read and written at `data_ptr()`.
    """
    global _patched
    with _LOCK, warnings.catch_warnings():
        # NumPy's warning about a maximum of NaN alone, which padding may hold
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        repair()
        _patched = set()
        try:
            fn.run(*arguments.values(), grid=grid, warmup=False)
        finally:
            _patched = None


def repair() -> None:
    """Make the three repairs and spare the repeated work, once a process."""
    global _repaired
    with _LOCK:
        if _repaired:
            return
        from triton.runtime import interpreter

        for fails, patch in (
            (_argument_copy_fails, _patch_argument_copy),
            (_run_time_range_fails, _patch_index),
            (_bfloat16_dot_fails, _patch_dot),
        ):
            if fails(interpreter):
                patch(interpreter)
        _patch_once_a_launch(interpreter)
        _patch_types(interpreter)
        _leave_out_silent_checks(interpreter.interpreter_builder)
        remember_shapes()
        _repaired = True


def _patch_once_a_launch(interpreter: Any) -> None:
    """Leave out what a launch has already put in place of the language's functions."""
    original = interpreter._patch_lang

    @cache
    def languages(fn: Any) -> frozenset[str]:
        """Modules of the language that a function sees, which are what is patched for it."""
        seen = (value for value in fn.__globals__.values() if inspect.ismodule(value))
        return frozenset(module.__name__ for module in seen if module in (tl, tl.core))

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


class _PlainTensor:
    """A tensor without torch's methods, for the probe."""

    def data_ptr(self) -> int:
        return 0


def _argument_copy_fails(interpreter: Any) -> bool:
    """True if the executor asks tensors for torch's storage."""
    executor = interpreter.GridExecutor(_argument_copy_fails, [], (1,))
    try:
        executor._init_args_hst([_PlainTensor()], {})
    except AttributeError:
        return True
    return False


def _patch_argument_copy(interpreter: Any) -> None:
    """Take arguments as they are unless torch storages are there, as torch users need them."""
    executor = interpreter.GridExecutor
    copy, restore = executor._init_args_hst, executor._restore_args_dev

    def init_args(self: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return copy(self, args, kwargs) if _needs_copy(args, kwargs) else (args, kwargs)

    def restore_args(self: Any, args: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        if _needs_copy(args, kwargs):
            restore(self, args, args_hst, kwargs, kwargs_hst)

    executor._init_args_hst, executor._restore_args_dev = init_args, restore_args


def _needs_copy(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True if an argument is a torch tensor, or may hold one (tuples, descriptors)."""
    values = [*args, *kwargs.values()]
    return any(
        hasattr(value, "untyped_storage")
        or isinstance(value, tuple)
        or hasattr(value, "block_shape")
        for value in values
    )


def _scalar(interpreter: Any, value: Any, dtype: Any) -> Any:
    """A run-time scalar as the interpreter holds it: one value in an array of one dimension."""
    return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.int32), dtype), dtype)


def _index_of(interpreter: Any) -> Callable[[Any], int]:
    """The conversion to an index that the interpreter installs in its tensors."""
    return _installed(interpreter, interpreter._patch_lang_tensor, "__index__")


def _installed(interpreter: Any, install: Callable[..., None], name: str) -> Any:
    """The attribute that the installing function puts on the class it is given."""

    class Target:
        pass

    scope = getattr(interpreter, "_LangPatchScope", None)
    install(Target) if scope is None else install(Target, scope())
    return Target.__dict__[name]


def _run_time_range_fails(interpreter: Any) -> bool:
    """True if a scalar tensor cannot be a bound of `range`."""
    try:
        _index_of(interpreter)(_scalar(interpreter, 3, tl.int32))
    except TypeError:
        return True
    return False


def _patch_index(interpreter: Any) -> None:
    """Convert through `.item()`; the interpreter installs its own again at every launch."""
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


def _bfloat16_dot_fails(interpreter: Any) -> bool:
    """True if the product of two bfloat16 ones is not one."""
    # 0x3F80 is one in bfloat16, which the interpreter holds as uint16
    one = interpreter.TensorHandle(np.full((1, 1), 0x3F80, dtype=np.uint16), tl.bfloat16)
    zero = interpreter.TensorHandle(np.zeros((1, 1), dtype=np.float32), tl.float32)
    builder = interpreter.interpreter_builder
    product = type(builder).create_dot(builder, one, one, zero, None, 0)
    return bool(product.data.item() != 1.0)


def _patch_dot(interpreter: Any) -> None:
    """Widen bfloat16 operands to float32, exactly, before the multiplication."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    builder.create_dot = create_dot
