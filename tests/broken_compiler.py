"""A compiler that refuses some kernels, whether they are compiled or interpreted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fd_dsa.ops import providers
from fd_dsa.triton_runtime import Kernel
from fd_dsa.triton_runtime import kernel as kernel_module


class PTXASError(Exception):
    """Error of Triton's compiler if its assembler fails, which is no error of ours."""


@contextmanager
def refusing_to_compile(*kernels: Kernel) -> Iterator[list[str]]:
    """Refuse to compile these kernels inside, as in a process that has not launched them.

    Yields:
        names of the kernels whose compilation was tried, one for each time.
    """
    tried: list[str] = []
    names = {kernel.fn: kernel.__name__ for kernel in kernels}

    def refusing(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(fn: Any, *given: Any) -> Any:
            if fn in names:
                tried.append(names[fn])
                raise PTXASError("ptxas died")
            return make(fn, *given)

        return made

    with pytest.MonkeyPatch.context() as patch, providers.asking_for({}):
        for name in ("compile_kernel", "InterpretedVariant"):
            patch.setattr(kernel_module, name, refusing(getattr(kernel_module, name)))
        for kernel in kernels:
            untouched = Kernel(kernel.fn, ((), (), ()), waits=False)
            for name, value in vars(untouched).items():
                patch.setitem(vars(kernel), name, value)
        yield tried
