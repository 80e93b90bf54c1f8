"""The parameters of a kernel: what each may be given, and errors that name them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fd_dsa.errors import LaunchError
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.compiler import Argument
from fd_dsa.triton_runtime.device_api import DeviceApi, api_for_type

MISSING = inspect.Parameter.empty
"""Stands for an argument that was not given."""

# options of a launch with the values used when none is given; Triton's own defaults change
OPTIONS: dict[str, Any] = {
    "num_warps": 4,
    "num_stages": 3,
    "enable_fp_fusion": True,
    "maxnreg": None,
    "launch_pdl": False,
}
_MOST_WARPS = 32
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
_INTEGERS = (
    ("i32", -(1 << 31), 1 << 31),
    ("i64", -(1 << 63), 1 << 63),
    ("u64", 1 << 63, 1 << 64),
)
_NAN = float("nan")


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


@lru_cache(maxsize=256)
def _element_type(dtype: object) -> str | None:
    """Triton's name of a dtype, given as a name or a library's object; None without one."""
    return ELEMENT_TYPES.get(str(dtype).rpartition(".")[2])


class Signature:
    """The parameters of one kernel, and what the compiler knows of their arguments.

    Attributes:
        kernel: its name.
        parameters: by name, in order.
    """

    def __init__(
        self,
        function: Callable[..., object],
        do_not_specialize: Iterable[str],
        do_not_specialize_on_alignment: Iterable[str],
        contiguous: Iterable[str],
    ) -> None:
        self.kernel: str = function.__name__
        self._call = inspect.signature(function)
        plain, unaligned = set(do_not_specialize), set(do_not_specialize_on_alignment)
        dense = set(contiguous)
        for name in (plain | unaligned | dense) - self._call.parameters.keys():
            raise LaunchError(f"kernel {self.kernel}: declares {name!r}, which is no parameter")
        self.parameters = {
            name: Parameter(
                name=name,
                is_constexpr="constexpr" in str(parameter.annotation),
                specialize=name not in plain,
                specialize_alignment=name not in plain | unaligned,
                contiguous=name in dense,
                default=parameter.default,
            )
            for name, parameter in self._call.parameters.items()
        }

    def error(self, name: str, problem: str) -> LaunchError:
        return LaunchError(f"kernel {self.kernel}: argument {name!r} {problem}")

    def bind(
        self, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> tuple[dict[str, object], dict[str, object]]:
        """Values of all parameters in order, and the options of the launch.

        Raises:
            LaunchError: an argument is missing, unknown or given twice, or an option is out of
                range.
        """
        options = {n: v for n, v in kwargs.items() if n in OPTIONS and n not in self.parameters}
        named = {name: value for name, value in kwargs.items() if name not in options}
        try:
            bound = self._call.bind(*args, **named)
        except TypeError as error:
            raise LaunchError(
                f"kernel {self.kernel}: {error}; parameters are {', '.join(self.parameters)}, "
                f"options {', '.join(OPTIONS)}"
            ) from None
        bound.apply_defaults()
        warps = options.get("num_warps", 1)
        if type(warps) is not int or not 1 <= warps <= _MOST_WARPS or warps & (warps - 1):
            raise LaunchError(
                f"kernel {self.kernel}: option num_warps is {warps!r}, allowed are the powers of "
                f"two from 1 to {_MOST_WARPS}"
            )
        # NumPy's scalars become Python's
        values = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in bound.arguments.items()
        }
        return values, OPTIONS | options

    def describe(self, parameter: Parameter, value: object) -> Argument:
        """What the compiler knows of a value given for a parameter; tensors may be `Pointer`.

        Raises:
            LaunchError: the value cannot be passed, or has gaps where none may be.
        """
        if parameter.is_constexpr:
            return self._constant(parameter, value)
        aligns = parameter.specialize_alignment
        if isinstance(value, Pointer):
            return Argument(self._pointer_type(parameter, value), aligns and value.aligned)
        if not hasattr(value, "data_ptr"):
            return self._scalar(parameter, value)
        # of any library, known by this method
        tensor: Any = value
        if parameter.contiguous and not tensor.is_contiguous():
            raise self.error(
                parameter.name,
                f"of shape {list(tensor.shape)} is not contiguous, but the kernel needs it so; "
                "call .contiguous() first",
            )
        is_aligned = aligns and tensor.data_ptr() % 16 == 0
        return Argument(self._pointer_type(parameter, tensor), is_aligned)

    def _pointer_type(self, parameter: Parameter, tensor: Tensor | Pointer) -> str:
        """Triton's type of the address of a tensor."""
        element = _element_type(tensor.dtype)
        if element is None:
            raise self.error(
                parameter.name,
                f"has dtype {str(tensor.dtype).rpartition('.')[2]}, which kernels cannot take; "
                f"allowed are {', '.join(ELEMENT_TYPES)}",
            )
        return "*" + element

    def _constant(self, parameter: Parameter, value: object) -> Argument:
        """The value of a `tl.constexpr` parameter, which is a key of the launch cache."""
        try:
            hash(value)
            is_constant = not hasattr(value, "data_ptr")
        except TypeError:
            is_constant = False
        if not is_constant:
            raise self.error(
                parameter.name,
                f"is a {type(value).__name__}, but it is compiled in; allowed are numbers, text, "
                "dtypes, tuples and None",
            )
        if isinstance(value, float):
            # a NaN is found by identity alone: one object for all finds what was compiled
            return Argument("constexpr", False, value if value == value else _NAN, repr(value))
        return Argument("constexpr", False, value, type(value))

    def _scalar(self, parameter: Parameter, value: object) -> Argument:
        """A number, or None, which is compiled in as an int of value 1 is."""
        if isinstance(value, bool):
            return Argument("i1")
        if isinstance(value, float):
            return Argument("fp32")
        if value is None or (isinstance(value, int) and parameter.specialize and value == 1):
            return Argument("constexpr", False, value, type(value))
        if not isinstance(value, int):
            raise self.error(
                parameter.name,
                f"is a {type(value).__name__}; allowed are tensors with data_ptr(), int, float, "
                "bool and None",
            )
        for kind, low, high in _INTEGERS:
            if low <= value < high:
                return Argument(kind, parameter.specialize_alignment and value % 16 == 0)
        raise self.error(parameter.name, f"is {value}, beyond 64 bits")

    def describe_all(self, values: Mapping[str, object]) -> dict[str, Argument]:
        return {name: self.describe(p, values[name]) for name, p in self.parameters.items()}

    def device_of(self, name: str, tensor: Tensor, api: DeviceApi) -> int:
        """Device that holds a tensor given for a parameter.

        Raises:
            LaunchError: it is not on a device.
        """
        try:
            return api.device_of(tensor)
        except LaunchError as error:
            raise LaunchError(f"kernel {self.kernel}: argument {name!r}: {error}") from None

    def place_of(
        self, values: Mapping[str, object], arguments: Mapping[str, Argument]
    ) -> tuple[DeviceApi, int]:
        """Tensor library and device of all tensors among the arguments.

        Raises:
            LaunchError: tensors of two libraries or devices meet, or there is no tensor.
        """
        first, place = "", None
        for name, argument in arguments.items():
            if argument.type[0] != "*":
                continue
            tensor: Any = values[name]
            api = api_for_type(type(tensor))
            device = self.device_of(name, tensor, api)
            if place is None:
                first, place = name, (api, device)
            if place != (api, device):
                raise self.error(
                    name,
                    f"is a {type(values[name]).__module__} tensor on device {device}, but "
                    f"{first!r} is a {type(values[first]).__module__} tensor on device "
                    f"{place[1]}; put all on one device",
                )
        if place is None:
            raise LaunchError(f"kernel {self.kernel}: no argument is a tensor")
        return place

    def check_changing(self, scalars: Sequence[str], values: Mapping[str, object]) -> None:
        """Refuse names whose value cannot change from launch to launch of one variant.

        Raises:
            LaunchError: no parameter, a constant, a tensor, or an int that is specialised.
        """
        for name in scalars:
            if name not in self.parameters:
                raise LaunchError(f"kernel {self.kernel}: scalar {name!r} is no parameter")
            value, parameter = values[name], self.parameters[name]
            if parameter.is_constexpr or type(value) not in (int, float):
                raise LaunchError(
                    f"kernel {self.kernel}: scalar {name!r} is {value!r}; a number that is passed "
                    "at run time is wanted"
                )
            if isinstance(value, int) and parameter.specialize:
                raise LaunchError(
                    f"kernel {self.kernel}: scalar {name!r} changes from launch to launch, but its "
                    "value may select another compiled kernel; name it in do_not_specialize"
                )
