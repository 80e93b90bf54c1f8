"""Launches in an interpreting process, with the same checks as compiled ones."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.triton_runtime import interpreter
from fd_dsa.triton_runtime.compiler import CODES
from fd_dsa.triton_runtime.device import api_for_type
from fd_dsa.triton_runtime.grid import Grid, resolve_grid
from fd_dsa.triton_runtime.parameters import Parameter


def run_interpreted(
    kernel: Any, grid: Grid, arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Run a kernel in Triton's interpreter.

    Raises:
        LaunchError: an argument or the grid cannot be used.
        BackendUnavailable: the kernel was decorated after Triton had been loaded to compile.
    """
    values = dict(arguments)
    for name, argument in kernel.signature.describe_ahead(arguments).items():
        if argument.type[0] == "*":
            try:
                values[name] = api_for_type(type(values[name])).interpreter_argument(values[name])
            except LaunchError as error:
                raise LaunchError(f"kernel {kernel.__name__}: argument {name!r}: {error}") from None
    if not hasattr(kernel.fn, "rewrite"):
        raise BackendUnavailable(
            f"kernel {kernel.__name__} was made by triton.jit in a process that had loaded Triton "
            "for compiling; set TRITON_INTERPRET=1 before the first import of triton"
        )
    numbers = resolve_grid(kernel.__name__, grid, arguments, options)
    if 0 not in numbers:
        interpreter.run(kernel.fn, numbers, values)


class InterpretedLaunch:
    """What `Kernel.bind` gives in an interpreting process; the same interface as `BoundLaunch`."""

    def __init__(
        self,
        kernel: Any,
        grid: Grid,
        arguments: dict[str, Any],
        options: dict[str, Any],
        scalars: tuple[str, ...],
    ) -> None:
        self._kernel, self.grid, self._options = kernel, grid, options
        self._arguments, self._scalars = arguments, scalars

    def __call__(self, *scalars: Any, grid: Grid | None = None) -> None:
        """Launch with new values of the named scalars, or with the bound ones if none is given.

        Raises:
            LaunchError: the number or the type of the scalars is wrong.
        """
        signature, bound = self._kernel.signature, self._arguments
        values = signature.with_scalars(bound, self._scalars, scalars)
        for parameter in signature.parameters if scalars else ():
            if parameter.name in self._scalars:
                self._check_scalar(parameter, values[parameter.name])
        run_interpreted(self._kernel, grid or self.grid, values, self._options)

    def _check_scalar(self, parameter: Parameter, value: Any) -> None:
        """Refuse a value that a compiled launch could not write where the bound one stands."""
        signature = self._kernel.signature
        bound = signature.scalar_type(parameter, self._arguments[parameter.name])
        try:
            struct.pack(f"={CODES[bound]}", value)
        except struct.error as error:
            raise LaunchError(
                f"kernel {signature.kernel}: {value!r} does not fit the scalar {parameter.name!r} "
                f"of the bound launch, {bound}: {error}"
            ) from None

    def exchange(self, **tensors: Any) -> None:
        """Replace bound tensors, all or none; each is checked.

        Raises:
            LaunchError: one is no tensor, has gaps, or is of another dtype than the bound one.
        """
        signature = self._kernel.signature
        for name, tensor in tensors.items():
            parameter = signature.check_exchange(name, self._arguments, tensor)
            bound = signature.check_tensor(parameter, self._arguments[name])
            new = signature.check_tensor(parameter, tensor)
            if new != bound:
                raise LaunchError(
                    f"kernel {signature.kernel}: argument {name!r} is *{new}, bound is *{bound}"
                )
        self._arguments = {**self._arguments, **tensors}
