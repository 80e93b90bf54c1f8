"""Triton's interpreter made faster for the tests, whose kernels are small and many.

It replaces the language's functions with its own at every call of a device function (`tl.sum` and
`tl.zeros` are two), builds its table of NumPy's types at every look-up, and looks for integer
overflows that it does not report: most of the time of many kernels. Here a launch does the first
once, a process does the second once, and the third is left out. Two blocks of one shape are not
broadcast, so nothing looks at their dimensions.

Every operation makes a block type and a tensor, and both make a new shape, which is a tuple of the
language with a type and a name of its own: half the time of a kernel of small blocks. A shape gives
the same objects each time, and nothing changes them; so they are shared.

Operands of one type need neither promotion nor broadcasting, and two types are always promoted to
the same third one. A number beside a block is made a block once. A conversion of values of at most
16 bits is a look-up in the table of all of them, which the interpreter's own conversion fills.
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
NUMBERS = {bool, float, int}
MAX_CONSTANTS = 4096


@cache
def hurry() -> None:
    """Spare the repeated work of this process's launches."""
    _patch_once_a_launch()
    _remember_builtins()
    _remember_array_types()
    _unwrap_quickly()
    # other releases have other functions for operands
    if hasattr(getattr(semantic, "TritonSemantic", None), "ternary_op_type_checking_impl"):
        _promote_what_differs()
        _keep_operands()
        _multiply_and_add_alike()
    _convert_by_tables()
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

    @cache
    def interpreted(member: Any) -> Any:
        """A function of the language that calls the interpreter, whatever it is given for it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **kwargs)

        return call

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        for name, member in builtins_of(package):
            if scope and hasattr(interpreter, "interpreter_semantic"):
                scope[0].set_attr(package, name, interpreted(member))
            else:
                # an older release
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch_builtin


def _unwrap_quickly() -> None:
    """Return numbers, types and tensors, which hold no constant, without a search for one."""
    original = core._unwrap_if_constexpr
    plain = {bool, float, int, str, type(None)}
    plain |= {core.block_type, core.dtype, core.pointer_type, core.tensor}

    def unwrap(given: Any) -> Any:
        kind = type(given)
        if kind in plain:
            return given
        return given.value if kind is core.constexpr else original(given)

    core._unwrap_if_constexpr = unwrap


def _have_one_shape(one: Any, other: Any) -> bool:
    """Tell if two types are blocks of one shape, or both of a single number."""
    if one.is_block() and other.is_block():
        return one.shape.values == other.shape.values
    return not (one.is_block() or other.is_block())


def _promote_what_differs() -> None:
    """Leave a value of the wanted type or shape as it is, and remember promotions."""
    kind = semantic.TritonSemantic
    broadcast, cast, promote = kind.broadcast_impl_value, kind.cast, kind.computation_type_impl
    promoted: dict[tuple[Any, ...], Any] = {}

    def splat(self: Any, number: Any, like: Any) -> Any:
        """Return a block of a number, without the type of it that only a compiler reads."""
        block = like.type.with_element_ty(number.dtype)
        return core.tensor(self.builder.create_splat(block, number.handle), block)

    def broadcasted(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.type.is_block() != rhs.type.is_block():
            is_block = lhs.type.is_block()
            return (lhs, splat(self, rhs, lhs)) if is_block else (splat(self, lhs, rhs), rhs)
        return (lhs, rhs) if _have_one_shape(lhs.type, rhs.type) else broadcast(self, lhs, rhs)

    def casted(self: Any, given: Any, wanted: Any, *rounding: Any) -> Any:
        is_kept = given.dtype.name == wanted.scalar.name
        return given if is_kept else cast(self, given, wanted, *rounding)

    def promotion(self: Any, one: Any, is_scalar: bool, other: Any, *more: bool) -> Any:
        key = one.name, is_scalar, other.name, *more
        if key not in promoted:
            promoted[key] = promote(self, one, is_scalar, other, *more)
        return promoted[key]

    kind.broadcast_impl_value, kind.cast = broadcasted, casted
    kind.computation_type_impl = promotion


def _keep_operands() -> None:
    """Leave operands of one type as they are, and remember numbers as tensors."""
    kind = semantic.TritonSemantic
    original = kind.binary_op_type_checking_impl
    constants: dict[tuple[Any, ...], Any] = {}

    def keeps_its_type(self: Any, dtype: Any, number: Any, div_or_mod: bool) -> bool:
        if not (dtype.is_int() or dtype.is_floating()):
            return False
        own = self.to_tensor_type(number)
        promoted = self.computation_type_impl(dtype, False, own, True, div_or_mod)
        return promoted.name == dtype.name

    def constant(self: Any, number: Any, like: Any) -> Any:
        """Make a number a tensor of the type and shape of another one."""
        shape = tuple(like.type.shape.values) if like.type.is_block() else ()
        key = type(number), number, like.dtype.name, shape
        made = constants.get(key)
        if made is None:
            scalar = self._cast_to_computation_type(number, like.dtype)
            made = self.broadcast_impl_value(like, scalar)[1]
            # zeros of both signs are equal
            if number != 0 or type(number) is int:
                constants[key] = made
                if len(constants) > MAX_CONSTANTS:
                    constants.clear()
        return made

    def check(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> tuple[Any, Any]:
        one, other = type(lhs), type(rhs)
        if one is other is core.tensor:
            has_pointer, other_has_pointer = lhs.dtype.is_ptr(), rhs.dtype.is_ptr()
            if not (has_pointer or other_has_pointer):
                if arithmetic_check:
                    own = lhs.dtype, False, rhs.dtype, False, div_or_mod
                    wanted = self.computation_type_impl(*own)
                    lhs, rhs = self.cast(lhs, wanted), self.cast(rhs, wanted)
                return self.broadcast_impl_value(lhs, rhs)
            if allow_lhs_ptr and has_pointer and rhs.dtype.is_int():
                return self.broadcast_impl_value(lhs, rhs)
        if arithmetic_check and one is core.tensor and other in NUMBERS:
            if keeps_its_type(self, lhs.dtype, rhs, div_or_mod):
                return lhs, constant(self, rhs, lhs)
        elif arithmetic_check and other is core.tensor and one in NUMBERS:  # noqa: SIM102
            if keeps_its_type(self, rhs.dtype, lhs, div_or_mod):
                return constant(self, lhs, rhs), rhs
        how = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        return original(self, lhs, rhs, *how)

    kind.binary_op_type_checking_impl = check


def _multiply_and_add_alike() -> None:
    """Leave three operands of one type and shape as they are."""
    kind, builder = semantic.TritonSemantic, interpreter.InterpreterBuilder
    check, create_fma = kind.ternary_op_type_checking_impl, builder.create_fma

    def checked(self: Any, a: Any, b: Any, c: Any) -> tuple[Any, Any, Any]:
        if (
            type(a) is type(b) is type(c) is core.tensor
            and a.dtype.name == b.dtype.name == c.dtype.name
            and _have_one_shape(a.type, b.type)
            and _have_one_shape(b.type, c.type)
        ):
            return a, b, c
        return check(self, a, b, c)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        one, two, three = x.data, y.data, z.data
        if three.dtype == np.float32 and one.shape == two.shape == three.shape:
            found = interpreter._interpreter.fma_fp32(one, two, three)
            return interpreter.TensorHandle(found, z.dtype.scalar)
        return create_fma(self, x, y, z)

    kind.ternary_op_type_checking_impl, builder.create_fma = checked, fma


def _convert_by_tables() -> None:
    """Look the conversions of narrow numbers up, and cut numbers of bfloat16 off."""
    original = interpreter._convert_float
    tables: dict[tuple[Any, ...], np.ndarray] = {}

    def convert(given: np.ndarray, of: Any, to: Any, rounding: Any) -> np.ndarray:
        bits = of.primitive_bitwidth
        if bits > 16:
            if of is core.float32 and to is core.bfloat16 and rounding is None:
                words = given.view(np.uint32)
                if not ((words << 1) - np.uint32(1) < np.uint32(0xFFFFFF)).any():
                    # without a number too small for an exponent it is the upper half
                    return (words >> 16).astype(np.uint16)
            return original(given, of, to, rounding)
        key = of.name, to.name, rounding
        codes = np.dtype(f"uint{bits}")
        if key not in tables:
            tables[key] = original(np.arange(1 << bits, dtype=codes), of, to, rounding)
        return tables[key][given.view(codes)]

    interpreter._convert_float = convert


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
