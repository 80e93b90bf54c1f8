"""Launches in an interpreting process, with the same checks as compiled ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.triton_runtime import interpreter
from fd_dsa.triton_runtime.device import api_for_type
from fd_dsa.triton_runtime.parameters import Grid, resolve_grid


def run_interpreted(
    kernel: Any, grid: Grid, arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Run a kernel in Triton's interpreter.

    Raises:
        LaunchError: an argument or the grid cannot be used.
        BackendUnavailable: the kernel was decorated after Triton had been loaded to compile.
    """
    signature, values = kernel.signature, dict(arguments)
    for parameter in signature.parameters:
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            continue
        if not hasattr(value, "data_ptr"):
            signature.scalar_type(parameter, value)
            continue
        signature.check_tensor(parameter, value)
        try:
            values[parameter.name] = api_for_type(type(value)).interpreter_argument(value)
        except LaunchError as error:
            raise LaunchError(
                f"kernel {kernel.__name__}: argument {parameter.name!r}: {error}"
            ) from None
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
        """Launch with new values of the named scalars, or with the bound ones if none is given."""
        values = self._kernel.signature.with_scalars(self._arguments, self._scalars, scalars)
        run_interpreted(self._kernel, grid or self.grid, values, self._options)

    def exchange(self, **tensors: Any) -> None:
        """Put other tensors in the place of bound ones."""
        for name, tensor in tensors.items():
            self._kernel.signature.check_tensor_name(name, self._arguments, tensor)
            self._arguments[name] = tensor
