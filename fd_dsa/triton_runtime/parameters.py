"""The parameters of a kernel: what each may be given, and errors that name them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.errors import LaunchError

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
class Parameter:
    """One parameter of a kernel.

    Attributes:
        name: as in the kernel's signature.
        is_constexpr: its value is compiled in.
        specialize: an int of value 1 is compiled in, one divisible by 16 is told to the compiler.
        specialize_alignment: a pointer or int divisible by 16 is told to the compiler.
        contiguous: only contiguous tensors are accepted.
        default: value if none is given; `inspect.Parameter.empty` where one must be.
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
                default=parameter.default,
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
        given = dict(zip(self.names, args, strict=False))
        options = {}
        for name, value in kwargs.items():
            if name in given:
                raise LaunchError(f"kernel {self.kernel}: argument {name!r} is given twice")
            if name in self.names:
                given[name] = value
            elif name in OPTIONS:
                options[name] = value
            else:
                raise LaunchError(
                    f"kernel {self.kernel}: unknown argument {name!r}; parameters are "
                    f"{', '.join(self.names)}, options {', '.join(OPTIONS)}"
                )
        return {p.name: self._value(p, given) for p in self.parameters}, OPTIONS | options

    def _value(self, parameter: Parameter, given: Mapping[str, Any]) -> Any:
        """The value of one parameter: given, or its default; NumPy scalars become Python's."""
        value = given.get(parameter.name, parameter.default)
        if value is inspect.Parameter.empty:
            raise LaunchError(f"kernel {self.kernel}: argument {parameter.name!r} is missing")
        return value.item() if isinstance(value, np.generic) else value

    def check_tensor(self, parameter: Parameter, tensor: Any) -> str:
        """Element type of a tensor given for a parameter.

        Raises:
            LaunchError: its dtype has no Triton type, or it has gaps where none may be.
        """
        name = str(tensor.dtype).rpartition(".")[2]
        if name not in ELEMENT_TYPES:
            raise LaunchError(
                f"kernel {self.kernel}: argument {parameter.name!r} has dtype {name}, which "
                f"kernels cannot take; allowed are {', '.join(ELEMENT_TYPES)}"
            )
        if parameter.contiguous and not tensor.is_contiguous():
            raise LaunchError(
                f"kernel {self.kernel}: argument {parameter.name!r} of shape "
                f"{list(tensor.shape)} is not contiguous, but the kernel needs it so; "
                "call .contiguous() first"
            )
        return ELEMENT_TYPES[name]

    def check_scalar(self, parameter: Parameter, value: Any) -> None:
        """Refuse what is no tensor, number, bool or None.

        Raises:
            LaunchError: naming the type that was found.
        """
        if not isinstance(value, bool | int | float | None):
            raise LaunchError(
                f"kernel {self.kernel}: argument {parameter.name!r} is a {type(value).__name__}; "
                "allowed are tensors with data_ptr(), int, float, bool and None"
            )
