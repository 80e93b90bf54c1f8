"""Launches without a look-up: a Python function generated for each variant of a kernel.

Its code is the checks that this variant needs and one call of the driver. Where the arguments
belong to another variant it hands them to `miss`, outside of its own `try`: `miss` raises the
errors that are caught there.

A tensor that was checked before is known by its live object and its address: both the same means
that dtype and place are what they were. Every other tensor is checked again.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.compiler import Argument
from fd_dsa.triton_runtime.device_api import DeviceApi, api_for_type
from fd_dsa.triton_runtime.grid import resolve_grid
from fd_dsa.triton_runtime.parameters import OPTIONS, Parameter
from fd_dsa.triton_runtime.variant import Variant

Miss = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]

_I32, _I64 = f"-{1 << 31} <= {{0}} < {1 << 31}", f"-{1 << 63} <= {{0}} < {1 << 63}"
# what an int must be for the type that the variant has
_RANGES = {
    "i32": _I32,
    "i64": f"{_I64} and not {_I32}",
    "u64": f"{1 << 63} <= {{0}} < {1 << 64}",
}


def generate(
    variant: Variant, api: DeviceApi, options: Mapping[str, object], miss: Miss
) -> Callable[..., None]:
    """A function `launch(grid, *args, **options)` for calls of one variant.

    Args:
        options: exactly the launch options that callers give.
        miss: called with (grid, values of all parameters, options) for every other call.
    """
    signature = variant.signature
    space = _namespace(variant, api, dict(options), miss)
    guards, tensors = ["_given != _options"], {}
    for index, parameter in enumerate(signature.parameters.values()):
        argument = variant.arguments[parameter.name]
        if argument.type.startswith("*"):
            tensors[parameter.name] = index
        else:
            guards.append(_guard(parameter, argument, f"_c{index}"))
    every = "(" + "".join(f"{name}, " for name in signature.parameters) + ")"
    packed = [f"_p{tensors[p.name]}" if p.name in tensors else p.name for p in variant.passed]
    late = [
        f"not {p.name}.is_contiguous()"
        for p in signature.parameters.values()
        if p.contiguous and p.name in tensors
    ]
    if variant.driver.num_devices > 1:
        late.append("_current_device() != _device")
    parameters = "".join(f"{name}=_d{i}, " for i, name in enumerate(signature.parameters))
    lines = [
        f"def {signature.kernel}(_grid, {parameters}**_given):",
        "  while True:",
        "    try:",
        f"      if {' or '.join(guards)}: break",
        *_check(tensors),
        *([f"      if {' or '.join(late)}: break"] if late else []),
        "      if _grid.__class__ is not tuple: _grid = _resolve(_kernel, _grid, "
        f"dict(zip(_names, {every})), _all_options)",
        "      _x, _y, _z = _grid",
        "      if not (_x and _y and _z): return",
        "      try: _frame = _pop()",
        "      except IndexError: _frame = _new()",
        f"      _pack(_frame.memory, 0, {''.join(f'{v}, ' for v in packed)}_x, _y, _z)",
        "      _s = _stream(_device)",
        "      if _s != _frame.stream: _frame.set_stream(_s)",
        "    except (AttributeError, TypeError, ValueError, _StructError):",
        "      break",
        "    _code = _launch(*_frame.call)",
        "    if _code: _recover(_code, _frame)",
        "    _append(_frame)",
        "    return",
        f"  return _miss(_grid, {every}, _given)",
    ]
    exec(compile("\n".join(lines), f"<launch of {signature.kernel}>", "exec"), space)
    return space[signature.kernel]


def _namespace(
    variant: Variant, api: DeviceApi, options: dict[str, object], miss: Miss
) -> dict[str, Any]:
    """Everything that the generated code names besides the kernel's parameters."""
    signature, known = variant.signature, Known(variant, api)
    space: dict[str, Any] = {
        "_all_options": OPTIONS | options,
        "_append": variant.free.append,
        "_current_device": api.current_device,
        "_device": variant.device,
        "_admit": known.admit,
        "_known": known.cell,
        "_kernel": signature.kernel,
        "_launch": variant.queue,
        "_miss": miss,
        "_names": tuple(signature.parameters),
        "_new": variant.frame,
        "_options": options,
        "_pack": variant.values.pack_into,
        "_pop": variant.free.pop,
        "_recover": variant.recover,
        "_resolve": resolve_grid,
        "_stream": api.current_stream,
        "_StructError": struct.error,
    }
    for index, parameter in enumerate(signature.parameters.values()):
        space[f"_d{index}"] = parameter.default
        space[f"_c{index}"] = variant.arguments[parameter.name].value
    return space


def _no_tensor() -> None:
    """A weak reference to nothing."""


class Known:
    """The tensors of the last launch of a variant, by parameter that takes one.

    Attributes:
        cell: one tuple of a weak reference and an address for each, all in one flat row; it is
            replaced as a whole, so that other threads never see half of a change.
    """

    def __init__(self, variant: Variant, api: DeviceApi) -> None:
        self._variant, self._api, self._device_of = variant, api, api.device_of
        self._parameters = [p for p in variant.passed if variant.arguments[p.name].type[0] == "*"]
        # type, dtype, whether alignment matters and must be there
        self._kinds: list[tuple[Any, Any, bool, bool]] = [
            (None, None, p.specialize_alignment, variant.arguments[p.name].divisible)
            for p in self._parameters
        ]
        self.cell: list[tuple[Any, ...]] = [(_no_tensor, 0) * len(self._parameters)]

    def admit(self, tensors: tuple[Tensor, ...], addresses: tuple[int, ...]) -> bool:
        """Check the tensors that are new in their places; False if one needs another variant.

        Raises:
            LaunchError: one cannot be passed at all.
        """
        known = list(self.cell[0])
        for index, (tensor, address) in enumerate(zip(tensors, addresses, strict=True)):
            if known[2 * index]() is tensor and known[2 * index + 1] == address:
                continue
            if not self._accepts(index, tensor, address):
                return False
            try:
                known[2 * index : 2 * index + 2] = weakref.ref(tensor), address
            except TypeError:
                # no weak references: it is checked in every launch
                known[2 * index] = _no_tensor
        self.cell[0] = tuple(known)
        return True

    def _accepts(self, index: int, tensor: Tensor, address: int) -> bool:
        """True if the variant takes the tensor; short where only device and address are new."""
        kind, dtype, matters, aligned = self._kinds[index]
        if type(tensor) is kind and tensor.dtype is dtype:
            if matters and (address & 15 == 0) is not aligned:
                return False
            return self._device_of(tensor) == self._variant.device
        variant, parameter = self._variant, self._parameters[index]
        signature, name = variant.signature, parameter.name
        if (
            api_for_type(type(tensor)) is not self._api
            or signature.describe(parameter, tensor) != variant.arguments[name]
            or signature.device_of(name, tensor, self._api) != variant.device
        ):
            return False
        self._kinds[index] = (type(tensor), tensor.dtype, matters, aligned)
        return True


def _check(tensors: Mapping[str, int]) -> list[str]:
    """Lines that take the tensors' addresses and make sure that they were checked."""
    if not tensors:
        return []
    new = [f"_p{i} != _q{i} or _r{i}() is not {name}" for name, i in tensors.items()]
    names = "".join(f"{name}, " for name in tensors)
    addresses = "".join(f"_p{i}, " for i in tensors.values())
    return [
        *(f"      _p{i} = {name}.data_ptr()" for name, i in tensors.items()),
        f"      {''.join(f'_r{i}, _q{i}, ' for i in tensors.values())} = _known[0]",
        f"      if ({' or '.join(new)}) and not _admit(({names}), ({addresses})): break",
    ]


def _guard(parameter: Parameter, argument: Argument, constant: str) -> str:
    """An expression that is true where a scalar or constant selects another variant."""
    name = parameter.name
    if argument.type == "constexpr":
        if isinstance(argument.value, float):
            return (
                f"{name} is not {constant} and "
                f"({name}.__class__ is not float or repr({name}) != {argument.kind!r})"
            )
        return (
            f"{name} is not {constant} and "
            f"({name}.__class__ is not {constant}.__class__ or {name} != {constant})"
        )
    if argument.type == "i1":
        return f"{name}.__class__ is not bool"
    if argument.type == "fp32":
        return f"{name}.__class__ is not float"
    tests = [f"{name}.__class__ is not int", f"not ({_RANGES[argument.type].format(name)})"]
    if parameter.specialize:
        tests.append(f"{name} == 1")
    if parameter.specialize_alignment:
        tests.append(f"{name} & 15" if argument.divisible else f"not {name} & 15")
    return " or ".join(tests)
