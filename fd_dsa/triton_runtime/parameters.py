"""The parameters of a kernel: what each may be given, and errors that name them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.errors import LaunchError
from fd_dsa.triton_runtime.compiler import Argument
from fd_dsa.triton_runtime.device import DeviceApi, api_for_type

MISSING = object()
"""Stands for an argument that was not given."""

# options of a launch with the values used when none is given; Triton's own defaults change
OPTIONS: dict[str, Any] = {
    "num_warps": 4,
    "num_stages": 3,
    "num_ctas": 1,
    "enable_fp_fusion": True,
    "maxnreg": None,
    "max_num_imprecise_acc_default": None,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
}
# options that must be a power of two, and the largest
_POWERS = {"num_warps": 32, "num_ctas": 16}
# name of a dtype, as Paddle, torch and NumPy spell it -> Triton's element type
ELEMENT_TYPES = {
    "bool": "i1",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
}


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor in `Kernel.warmup`.

    Attributes:
        dtype: its name, such as "bfloat16".
        aligned: its address is a multiple of 16, as that of a whole tensor always is.
    """

    dtype: str
    aligned: bool = True


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    Attributes:
        name: as in the kernel's signature.
        is_constexpr: its value is compiled in.
        specialize: an int of value 1 is compiled in, one divisible by 16 is known to the compiler.
        specialize_alignment: a pointer or int divisible by 16 is known to the compiler.
        contiguous: only contiguous tensors are accepted.
        default: value if none is given; `MISSING` where one must be.
    """

    name: str
    is_constexpr: bool
    specialize: bool
    specialize_alignment: bool
    contiguous: bool
    default: Any


class Signature:
    """The parameters of one kernel, and how call arguments are laid on them."""

    def __init__(
        self,
        function: Callable[..., Any],
        do_not_specialize: Iterable[str],
        do_not_specialize_on_alignment: Iterable[str],
        contiguous: Iterable[str],
    ) -> None:
        self.kernel: str = function.__name__
        parameters = inspect.signature(function).parameters
        plain, unaligned = set(do_not_specialize), set(do_not_specialize_on_alignment)
        dense = set(contiguous)
        for name in (plain | unaligned | dense) - parameters.keys():
            raise LaunchError(f"kernel {self.kernel}: declares {name!r}, which is no parameter")
        self.parameters = tuple(
            Parameter(
                name=name,
                is_constexpr="constexpr" in str(parameter.annotation),
                specialize=name not in plain,
                specialize_alignment=name not in plain | unaligned,
                contiguous=name in dense,
                default=MISSING if parameter.default is parameter.empty else parameter.default,
            )
            for name, parameter in parameters.items()
        )
        self.names = tuple(parameters)

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Values of all parameters in order, and the options of the launch.

        Raises:
            LaunchError: an argument is missing, unknown or given twice.
        """
        if len(args) > len(self.names):
            raise LaunchError(
                f"kernel {self.kernel}: {len(args)} positional arguments for "
                f"{len(self.names)} parameters ({', '.join(self.names)})"
            )
        pairs = zip(self.names, args, strict=False)
        values = {name: value for name, value in pairs if value is not MISSING}
        options = {}
        for name, value in kwargs.items():
            if name in values:
                raise LaunchError(f"kernel {self.kernel}: argument {name!r} is given twice")
            if name in self.names:
                values[name] = value
            elif name in OPTIONS:
                options[name] = value
            else:
                raise LaunchError(
                    f"kernel {self.kernel}: unknown argument {name!r}; parameters are "
                    f"{', '.join(self.names)}, options {', '.join(OPTIONS)}"
                )
        self._check_options(options)
        arguments = {}
        for parameter in self.parameters:
            value = values.get(parameter.name, parameter.default)
            if value is MISSING:
                raise LaunchError(f"kernel {self.kernel}: argument {parameter.name!r} is missing")
            # NumPy's scalars become Python's
            arguments[parameter.name] = value.item() if isinstance(value, np.generic) else value
        return arguments, OPTIONS | options

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse numbers of warps and blocks that Triton's compiler cannot take.

        Raises:
            LaunchError: names the option.
        """
        for name, most in _POWERS.items():
            value = options.get(name, 1)
            if type(value) is not int or not 1 <= value <= most or value & (value - 1):
                raise LaunchError(
                    f"kernel {self.kernel}: option {name} is {value!r}, allowed are the powers of "
                    f"two from 1 to {most}"
                )

    def check_tensor(self, parameter: Parameter, tensor: Any) -> str:
        """Element type of a tensor given for a parameter.

        Raises:
            LaunchError: its dtype has no Triton type, or it has gaps where none may be.
        """
        element = self._element_of(parameter, tensor.dtype)
        if parameter.contiguous and not tensor.is_contiguous():
            raise LaunchError(
                f"kernel {self.kernel}: argument {parameter.name!r} of shape "
                f"{list(tensor.shape)} is not contiguous, but the kernel needs it so; "
                "call .contiguous() first"
            )
        return element

    def _element_of(self, parameter: Parameter, dtype: Any) -> str:
        """Triton's name of a tensor library's dtype object."""
        kept, element = _ELEMENT_OF.get(id(dtype), (None, ""))
        if kept is not dtype:
            element = self._element_type(parameter, str(dtype).rpartition(".")[2])
            if len(_ELEMENT_OF) > _MAX_DTYPES:
                _ELEMENT_OF.clear()
            _ELEMENT_OF[id(dtype)] = dtype, element
        return element

    def _element_type(self, parameter: Parameter, dtype: str) -> str:
        """Triton's name of a dtype."""
        if dtype not in ELEMENT_TYPES:
            raise LaunchError(
                f"kernel {self.kernel}: argument {parameter.name!r} has dtype {dtype}, which "
                f"kernels cannot take; allowed are {', '.join(ELEMENT_TYPES)}"
            )
        return ELEMENT_TYPES[dtype]

    def device_of(self, parameter: Parameter, tensor: Any, api: DeviceApi) -> int:
        """Device that holds a tensor given for a parameter.

        Raises:
            LaunchError: it is not on a device.
        """
        try:
            return api.device_of(tensor)
        except LaunchError as error:
            raise LaunchError(
                f"kernel {self.kernel}: argument {parameter.name!r}: {error}"
            ) from None

    def scalar_type(self, parameter: Parameter, value: Any) -> str:
        """Triton's type of a number given for a parameter; "constexpr" for None.

        Raises:
            LaunchError: it is no bool, int, float or None, or an int beyond 64 bits.
        """
        if isinstance(value, bool):
            return "i1"
        if isinstance(value, int):
            for name, low, high in _INTEGERS:
                if low <= value < high:
                    return name
            raise LaunchError(
                f"kernel {self.kernel}: argument {parameter.name!r} is {value}, beyond 64 bits"
            )
        if value is not None and not isinstance(value, float):
            raise LaunchError(
                f"kernel {self.kernel}: argument {parameter.name!r} is a {type(value).__name__}; "
                "allowed are tensors with data_ptr(), int, float, bool and None"
            )
        return "constexpr" if value is None else "fp32"

    def constant(self, parameter: Parameter, value: Any) -> Argument:
        """What the compiler knows of the value of a `tl.constexpr` parameter.

        Raises:
            LaunchError: it is a tensor, or cannot be a key of the launch cache.
        """
        try:
            hash(value)
            is_constant = not hasattr(value, "data_ptr")
        except TypeError:
            is_constant = False
        if not is_constant:
            raise LaunchError(
                f"kernel {self.kernel}: argument {parameter.name!r} is a {type(value).__name__}, "
                "but it is compiled in; allowed are numbers, text, dtypes, tuples and None"
            )
        if isinstance(value, float):
            # a NaN is found by identity alone: one object for all finds what was compiled
            return Argument("constexpr", False, value if value == value else _NAN, repr(value))
        return Argument("constexpr", False, value, type(value))

    def scalar(self, parameter: Parameter, value: Any) -> Argument:
        """What the compiler knows of a number given for a parameter."""
        kind = self.scalar_type(parameter, value)
        is_integer = kind in ("i32", "i64", "u64")
        if kind == "constexpr" or (is_integer and parameter.specialize and value == 1):
            return Argument("constexpr", False, value, type(value))
        divisible = is_integer and parameter.specialize_alignment and value % 16 == 0
        return Argument(kind, divisible)

    def describe_ahead(self, values: Mapping[str, Any]) -> dict[str, Argument]:
        """What the compiler knows of arguments of which tensors may be `Pointer`."""
        arguments = {}
        for parameter in self.parameters:
            value = values[parameter.name]
            if parameter.is_constexpr:
                arguments[parameter.name] = self.constant(parameter, value)
            elif isinstance(value, Pointer):
                aligned = parameter.specialize_alignment and value.aligned
                kind = "*" + self._element_type(parameter, value.dtype)
                arguments[parameter.name] = Argument(kind, aligned)
            elif hasattr(value, "data_ptr"):
                arguments[parameter.name] = self.describe_tensor(parameter, value)
            else:
                arguments[parameter.name] = self.scalar(parameter, value)
        return arguments

    def describe_tensor(self, parameter: Parameter, value: Any) -> Argument:
        """What the compiler knows of a tensor."""
        kind = "*" + self.check_tensor(parameter, value)
        return Argument(kind, parameter.specialize_alignment and value.data_ptr() % 16 == 0)

    def check_changing(self, scalars: Sequence[str], values: Mapping[str, Any]) -> None:
        """Refuse names whose value cannot change from launch to launch of one variant.

        Raises:
            LaunchError: no parameter, a constant, a tensor, or an int that is specialised.
        """
        for name in scalars:
            if name not in self.names:
                raise LaunchError(f"kernel {self.kernel}: scalar {name!r} is no parameter")
            value, parameter = values[name], self.parameters[self.names.index(name)]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if parameter.is_constexpr or not is_number:
                raise LaunchError(
                    f"kernel {self.kernel}: scalar {name!r} is {value!r}; a number that is passed "
                    "at run time is wanted"
                )
            if isinstance(value, int) and parameter.specialize:
                raise LaunchError(
                    f"kernel {self.kernel}: scalar {name!r} changes from launch to launch, but its "
                    "value may select another compiled kernel; name it in do_not_specialize"
                )

    def with_scalars(
        self, values: Mapping[str, Any], names: Sequence[str], scalars: Sequence[Any]
    ) -> dict[str, Any]:
        """The values with some scalars exchanged; unchanged if none is given.

        Raises:
            LaunchError: another number of scalars than of names.
        """
        if scalars and len(scalars) != len(names):
            raise LaunchError(
                f"kernel {self.kernel}: {len(scalars)} scalars for {len(names)} names "
                f"({', '.join(names)})"
            )
        return {**values, **dict(zip(names, scalars, strict=False))}

    def check_exchange(self, name: str, values: Mapping[str, Any], tensor: Any) -> Parameter:
        """The parameter of a bound tensor that is to be exchanged for another one.

        Raises:
            LaunchError: the parameter is none, or one of the two is no tensor.
        """
        if not hasattr(values.get(name), "data_ptr"):
            raise LaunchError(f"kernel {self.kernel}: no tensor is bound to {name!r}")
        if not hasattr(tensor, "data_ptr"):
            raise LaunchError(
                f"kernel {self.kernel}: argument {name!r} is a {type(tensor).__name__}; "
                "a tensor is bound there"
            )
        return self.parameters[self.names.index(name)]

    def describe(self, values: Mapping[str, Any]) -> tuple[DeviceApi, int, dict[str, Argument]]:
        """Tensor library, device, and what the compiler knows of each argument.

        Raises:
            LaunchError: an argument cannot be passed, tensors of two libraries or devices meet, or
                there is no tensor.
        """
        api, device, first = None, 0, ""
        arguments = self.describe_ahead(values)
        for parameter in self.parameters:
            value = values[parameter.name]
            if arguments[parameter.name].type[0] != "*":
                continue
            own = api_for_type(type(value))
            on = self.device_of(parameter, value, own)
            if api is None:
                api, device, first = own, on, parameter.name
            if own is not api or on != device:
                raise LaunchError(
                    f"kernel {self.kernel}: argument {parameter.name!r} is a "
                    f"{type(value).__module__} tensor on device {on}, but {first!r} is a "
                    f"{type(values[first]).__module__} tensor on device {device}; put all on "
                    "one device"
                )
        if api is None:
            raise LaunchError(f"kernel {self.kernel}: no argument is a tensor")
        return api, device, arguments


# id of a dtype object -> the object, which keeps the id its own, and Triton's name; the objects'
# own hash and text cost more than a launch
_ELEMENT_OF: dict[int, tuple[Any, str]] = {}
_MAX_DTYPES = 256
_NAN = float("nan")

_INTEGERS = (
    ("i32", -(1 << 31), 1 << 31),
    ("i64", -(1 << 63), 1 << 63),
    ("u64", 1 << 63, 1 << 64),
)
