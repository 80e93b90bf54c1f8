"""Triton's interpreter made faster for the tests, whose kernels are small and many.

It replaces the language's functions with its own at every call of a device function (`tl.sum` and
`tl.zeros` are two), builds its table of NumPy's types at every look-up, and looks for integer
overflows that it does not report: most of the time of many kernels. Here a launch does the first
once, a process does the second once, and the third is left out. Two blocks of one shape are not
broadcast, so nothing looks at their dimensions.

Every operation makes a block type and a tensor, and both make a new shape, which is a tuple of the
language with a type and a name of its own: half the time of a kernel of small blocks. A shape gives
the same objects each time, and nothing changes them; so they are shared.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

import triton
from triton.language import core, semantic
from triton.runtime import interpreter

# modules of the language that the launch in progress has made the interpreter's; None between two
_patched: set[str] | None = None


@cache
def hurry() -> None:
    """Spare the repeated work of this process's launches."""
    _patch_once_a_launch()
    _remember_builtins()
    _remember_array_types()
    _broadcast_what_differs()
    builder = interpreter.interpreter_builder
    # without `debug`, `device_assert` does nothing with what the checks compute
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    # another release's classes, which set other attributes, are left alone
    block = core.block_type(core.float32, [2, 4])
    if set(vars(block)) == {"element_ty", "shape", "numel", "name"}:
        _remember_types()
    if set(vars(core.tensor(None, block))) == {"handle", "shape", "numel", "type", "dtype"}:
        _remember_tensors()


def _patch_once_a_launch() -> None:
    """Leave out what a launch has already put in place of the language's functions."""
    original, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    @cache
    def languages(fn: Any) -> frozenset[str]:
        """Modules of the language that a function sees, which are what is patched for it."""
        seen = (value for value in fn.__globals__.values() if inspect.ismodule(value))
        return frozenset(module.__name__ for module in seen if module in (core, triton.language))

    def patch_lang(fn: Any) -> Any:
        modules, patched = languages(fn), set() if _patched is None else _patched
        # a function that sees none is refused by the original
        if modules and modules <= patched:
            return None
        patched.update(modules)
        return original(fn)

    def watched(*args: Any, **kwargs: Any) -> None:
        global _patched
        _patched = set()
        try:
            launch(*args, **kwargs)
        finally:
            _patched = None

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, watched


def _remember_builtins() -> None:
    """Remember which functions of a module or class of the language the interpreter replaces."""

    @cache
    def builtins_of(package: Any) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in inspect.getmembers(package) if core.is_builtin(m)]

    def patch_builtin(package: Any, *builder_and_scope: Any) -> None:
        for name, member in builtins_of(package):
            interpreter._patch_attr(package, name, member, *builder_and_scope)

    interpreter._patch_builtin = patch_builtin


def _broadcast_what_differs() -> None:
    """Leave two blocks of one shape as they are without a look at each dimension."""
    original = semantic.TritonSemantic.broadcast_impl_value

    def broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return original(self, lhs, rhs)

    semantic.TritonSemantic.broadcast_impl_value = broadcast


def _remember_array_types() -> None:
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
