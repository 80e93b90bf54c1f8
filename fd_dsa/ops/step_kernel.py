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
    """`paddle_jit` of a kernel whose numbers change from step to step.

    None of them selects another compiled form but those `specialized`, nor does the alignment of
    tensors `unaligned`; every tensor, named `*_ptr`, must be contiguous but those `strided`.
    One that `waits` may be launched while the kernel before it runs; see `paddle_jit`.
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
