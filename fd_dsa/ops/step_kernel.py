"""Decorator of kernels whose numbers change from step to step."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from fd_dsa.triton_runtime import Kernel, paddle_jit


def step_kernel(
    strided: tuple[str, ...] = (),
    specialized: tuple[str, ...] = (),
    unaligned: tuple[str, ...] = (),
    waits: bool = False,
) -> Callable[[Callable[..., object]], Kernel]:
    """Make a decorator that turns a function into a kernel, see `paddle_jit`.

    Integers of a launch change from step to step, so their values do not select a compiled form.
    Parameters named `*_ptr` are tensors.

    Args:
        strided: tensors that may have gaps. All others must be contiguous.
        specialized: integers whose values select a compiled form.
        unaligned: tensors whose alignment does not select a compiled form.
        waits: True if the kernel calls `wait_for_inputs`, so that it may be launched while the
            kernel before it runs.
    """

    def decorate(function: Callable[..., object]) -> Kernel:
        parameters = inspect.signature(function).parameters.values()
        names = {p.name for p in parameters if "constexpr" not in str(p.annotation)}
        tensors = {name for name in names if name.endswith("_ptr")}
        return paddle_jit(
            function,
            do_not_specialize=names - tensors - set(specialized),
            do_not_specialize_on_alignment=unaligned,
            contiguous=tensors - set(strided),
            waits=waits,
        )

    return decorate
