"""`paddle_jit`: a decorator that launches Triton kernels on Paddle tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.triton_runtime import interpreter
from fd_dsa.triton_runtime.device import api_for_type
from fd_dsa.triton_runtime.parameters import Signature

import triton

Grid = tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]]


def paddle_jit(
    fn: Callable[..., Any] | None = None,
    *,
    do_not_specialize: Iterable[str] = (),
    do_not_specialize_on_alignment: Iterable[str] = (),
    contiguous: Iterable[str] = (),
) -> Any:
    """A kernel that is launched by `kernel[grid](...)` on Paddle tensors.

    Args:
        fn: a Python function in Triton's language, or what `triton.jit` made of one.
        do_not_specialize: ints whose value never selects another compiled kernel; name every
            length here that changes from step to step.
        do_not_specialize_on_alignment: pointers and ints whose alignment never does.
        contiguous: tensors that must be contiguous.

    Returns:
        A `Kernel`, or with options only, the decorator that makes one.

    Raises:
        LaunchError: a declared name is no parameter.
    """
    if fn is None:
        return partial(
            paddle_jit,
            do_not_specialize=do_not_specialize,
            do_not_specialize_on_alignment=do_not_specialize_on_alignment,
            contiguous=contiguous,
        )
    return Kernel(fn, do_not_specialize, do_not_specialize_on_alignment, contiguous)


class Kernel:
    """A Triton kernel and its launches; made by `paddle_jit`.

    Attributes:
        fn: the `triton.jit` function, for calls from other kernels.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        do_not_specialize: Iterable[str] = (),
        do_not_specialize_on_alignment: Iterable[str] = (),
        contiguous: Iterable[str] = (),
    ) -> None:
        function = fn.fn if hasattr(fn, "run") else fn
        self.signature = Signature(
            function, do_not_specialize, do_not_specialize_on_alignment, contiguous
        )
        self.fn = fn if hasattr(fn, "run") else triton.jit(fn)
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        """The launch on this grid; call it with the kernel's arguments."""
        return partial(self.run, grid)

    def run(self, grid: Grid, *args: Any, **kwargs: Any) -> None:
        """Launch on a grid of one to three numbers, or a function of all arguments by name.

        Raises:
            LaunchError: an argument or the grid cannot be used; it is named.
            BackendUnavailable: no GPU, and no interpreter either.
        """
        arguments, options = self.signature.bind(args, kwargs)
        run_interpreted(self, grid, arguments, options)

    def bind(
        self, grid: Grid, *args: Any, scalars: tuple[str, ...] = (), **kwargs: Any
    ) -> InterpretedLaunch:
        """A launch whose arguments are checked once.

        Args:
            grid: as for a launch; may be replaced in every call.
            args, kwargs: as for a launch.
            scalars: names of ints and floats that each call gives anew, in this order.
        """
        arguments, options = self.signature.bind(args, kwargs)
        return InterpretedLaunch(self, grid, arguments, options, scalars)


def resolve_grid(
    kernel: str, grid: Grid, arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[int, int, int]:
    """The grid as three numbers.

    Raises:
        LaunchError: it has no or more than three numbers, or a negative one.
    """
    numbers = tuple(grid({**options, **arguments}) if callable(grid) else grid)
    if not 1 <= len(numbers) <= 3 or any(int(n) != n or n < 0 for n in numbers):
        raise LaunchError(f"kernel {kernel}: grid {numbers}: wanted one to three numbers >= 0")
    x, y, z = (*(int(n) for n in numbers), 1, 1)[:3]
    return x, y, z


def run_interpreted(
    kernel: Kernel, grid: Grid, arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Run a kernel in Triton's interpreter, after the checks of a compiled launch."""
    signature, values = kernel.signature, dict(arguments)
    for parameter in signature.parameters:
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            continue
        if hasattr(value, "data_ptr"):
            signature.check_tensor(parameter, value)
            try:
                values[parameter.name] = api_for_type(type(value)).interpreter_argument(value)
            except LaunchError as error:
                raise LaunchError(
                    f"kernel {kernel.__name__}: argument {parameter.name!r} is {error}"
                ) from None
        else:
            signature.check_scalar(parameter, value)
    if not hasattr(kernel.fn, "rewrite"):
        raise BackendUnavailable(
            f"kernel {kernel.__name__}: no GPU is visible, and triton was imported before "
            "fd_dsa.triton_runtime, so the kernel cannot run in Triton's interpreter; import "
            "fd_dsa.triton_runtime first, or set TRITON_INTERPRET=1"
        )
    numbers = resolve_grid(kernel.__name__, grid, arguments, options)
    if 0 not in numbers:
        interpreter.run(kernel.fn, numbers, values)


class InterpretedLaunch:
    """What `Kernel.bind` gives in an interpreting process; the same interface as `BoundLaunch`."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Grid,
        arguments: dict[str, Any],
        options: dict[str, Any],
        scalars: tuple[str, ...],
    ) -> None:
        self._kernel, self._grid, self._options = kernel, grid, options
        self._arguments, self._scalars = arguments, scalars
        for name in set(scalars) - arguments.keys():
            raise LaunchError(f"kernel {kernel.__name__}: scalar {name!r} is no parameter")

    def __call__(self, *scalars: Any, grid: Grid | None = None) -> None:
        """Launch with new values of the named scalars, or with the old ones if none is given."""
        if scalars:
            self._arguments.update(zip(self._scalars, scalars, strict=True))
        run_interpreted(self._kernel, grid or self._grid, self._arguments, self._options)

    def exchange(self, **tensors: Any) -> None:
        """Put other tensors in the place of bound ones."""
        for name, tensor in tensors.items():
            if name not in self._arguments:
                raise LaunchError(f"kernel {self._kernel.__name__}: no argument {name!r}")
            self._arguments[name] = tensor
