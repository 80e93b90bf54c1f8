"""The kernels of custom_ops/ for torch tensors, built here if nvcc is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from custom_ops.build_library import BuildError, build_library
from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable


@cache
def library() -> Path | None:
    """Path of the C library; None, said once, where it cannot be built."""
    try:
        return build_library()
    except BuildError as error:
        print(f"custom operators left out: {str(error)[:200]}", flush=True)
        return None


def without(make: Callable[[], Any]) -> Any:
    """What `make` sets up with Triton's kernels, whatever was taken before.

    Raises:
        RuntimeError: the package fd_dsa_ops is installed here and serves.
    """
    custom_ops.use_library(None)
    made = make()
    serving = [choice.operator for choice in custom_ops.choices() if choice.serves]
    if serving:
        raise RuntimeError(f"fd_dsa_ops serves {', '.join(serving)}; uninstall it to compare both")
    return made


def set_up(operator: str, make: Callable[[], Any]) -> Any | None:
    """What `make` sets up while the library's kernel serves `operator`; None where it does not.

    Whatever is made before and after has Triton's kernel.
    """
    path = library()
    if path is None:
        return None
    try:
        custom_ops.use_library(path)
        made = make()
        choices = [choice for choice in custom_ops.choices() if choice.operator == operator]
    except BackendUnavailable as error:
        print(f"custom operator left out: {error}", flush=True)
        return None
    finally:
        custom_ops.use_library(None)
    if any(choice.serves for choice in choices):
        return made
    reason = choices[0].reason if choices else "nothing asked for it"
    print(f"custom operator left out: {operator}: {reason}", flush=True)
    return None
