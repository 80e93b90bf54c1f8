"""Parameters of a kernel: checks of their arguments, and errors that name them."""

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

# default options of a launch, fixed here because Triton's own defaults change
OPTIONS: dict[str, Any] = {
    "num_warps": 4,
    "num_stages": 3,
    "enable_fp_fusion": True,
    "maxnreg": None,
    "launch_pdl": False,
}
_MAX_WARPS = 32
# name of a dtype in Paddle, torch and NumPy -> Triton's element type
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
    """Stand-in for a tensor in `Kernel.warmup`.

    Attributes:
        dtype: name of the dtype, such as "bfloat16".
        aligned: True if the address is a multiple of 16, like that of every whole tensor.
    """

    dtype: str
    aligned: bool = True


@dataclass(frozen=True)
class Parameter:
    """Parameter of a kernel.

    Attributes:
        name: name in the kernel's signature.
        is_constexpr: True if the value is compiled in.
        specialize: True if an int of value 1 is compiled in.
        specialize_alignment: True if the compiler may use that a pointer or int is divisible by 16.
        contiguous: True if only contiguous tensors are accepted.
    """

    name: str
    is_constexpr: bool
    specialize: bool
    specialize_alignment: bool
    contiguous: bool


@lru_cache(maxsize=256)
def _element_type(dtype: object) -> str | None:
    """Return Triton's name of a dtype (a name or a library's object), None without one."""
    return ELEMENT_TYPES.get(str(dtype).rpartition(".")[2])


class Signature:
    """Parameters of one kernel, and checks of their arguments.

    Attributes:
        kernel: name of the kernel.
        parameters: parameters by name, in order of their declaration.
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
            )
            for name, parameter in self._call.parameters.items()
        }

    def error(self, name: str, problem: str) -> LaunchError:
        return LaunchError(f"kernel {self.kernel}: argument {name!r} {problem}")

    def bind(
        self, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> tuple[dict[str, object], dict[str, object]]:
        """Return the values of all parameters in order, and the options of the launch.

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
        if type(warps) is not int or not 1 <= warps <= _MAX_WARPS or warps & (warps - 1):
            raise LaunchError(
                f"kernel {self.kernel}: option num_warps is {warps!r}, allowed are the powers of "
                f"two from 1 to {_MAX_WARPS}"
            )
        # convert scalars of NumPy, which have other types than Python's
        values = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in bound.arguments.items()
        }
        return values, OPTIONS | options

    def describe(self, parameter: Parameter, value: object) -> Argument:
        """Return the properties of an argument, a value, tensor or `Pointer`.

        Raises:
            LaunchError: the argument cannot be passed, or is not contiguous but must be.
        """
        if parameter.is_constexpr:
            return self._constant(parameter, value)
        aligns = parameter.specialize_alignment
        if isinstance(value, Pointer):
            return Argument(self._pointer_type(parameter, value), aligns and value.aligned)
        if not hasattr(value, "data_ptr"):
            return self._scalar(parameter, value)
        # a tensor of any library has this method
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
        """Return Triton's type of the address of a tensor."""
        element = _element_type(tensor.dtype)
        if element is None:
            raise self.error(
                parameter.name,
                f"has dtype {str(tensor.dtype).rpartition('.')[2]}, which kernels cannot take; "
                f"allowed are {', '.join(ELEMENT_TYPES)}",
            )
        return "*" + element

    def _constant(self, parameter: Parameter, value: object) -> Argument:
        """Return the properties of a `tl.constexpr` argument, a key of the launch cache."""
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
            # NaN equals only itself, so one NaN object stands for all in the launch cache
            return Argument("constexpr", False, value if value == value else _NAN, repr(value))
        return Argument("constexpr", False, value, type(value))

    def _scalar(self, parameter: Parameter, value: object) -> Argument:
        """Return the properties of a number or None. An int of value 1 may be compiled in."""
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
        """Return the device that holds the tensor of a parameter.

        Raises:
            LaunchError: the tensor is not on a device.
        """
        try:
            return api.device_of(tensor)
        except LaunchError as error:
            raise LaunchError(f"kernel {self.kernel}: argument {name!r}: {error}") from None

    def place_of(
        self, values: Mapping[str, object], arguments: Mapping[str, Argument]
    ) -> tuple[DeviceApi, int]:
        """Return the tensor library and the device of all tensors among the arguments.

        Raises:
            LaunchError: tensors have different libraries or devices, or there is no tensor.
        """
        first, place = "", None
        for name, argument in arguments.items():
            if not argument.is_pointer:
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
        """Refuse scalars whose value may not change between launches of one variant.

        Raises:
            LaunchError: a name is no parameter, a constant, a tensor, or an int that is
                specialized.
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
