"""The kernels of custom_ops/ for torch tensors, built here if nvcc is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from custom_ops.build_library import BuildError, build_library
from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable
from fd_dsa.ops import providers
from fd_dsa.ops.providers import CUSTOM_OP


@cache
def library() -> Path | None:
    """Path of the C library, or None if it cannot be built; the reason is printed once."""
    try:
        return build_library()
    except BuildError as error:
        print(f"custom operators left out: {str(error)[:200]}", flush=True)
        return None


def serving() -> dict[str, bool | str]:
    """Operator with a kernel of custom_ops/ -> whether that serves, or why not."""
    choices = {
        operator: choice for operator, by in providers.table().items() for choice in by.values()
    }
    return {
        operator: choice.provider == CUSTOM_OP or choice.against[CUSTOM_OP]
        for operator, choice in choices.items()
        if choice.provider == CUSTOM_OP or CUSTOM_OP in choice.against
    }


def without(make: Callable[[], Any]) -> Any:
    """What `make` sets up with Triton's kernels, whatever was taken before.

    Raises:
        RuntimeError: the package fd_dsa_ops is installed here and serves.
    """
    custom_ops.use_library(None)
    providers.forget()
    made = make()
    names = [operator for operator, reason in serving().items() if reason is True]
    if names:
        raise RuntimeError(f"fd_dsa_ops serves {', '.join(names)}; uninstall it to compare both")
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
        providers.forget()
        made = make()
        reason = serving().get(operator, "nothing asked for it")
    except BackendUnavailable as error:
        print(f"custom operator left out: {error}", flush=True)
        return None
    finally:
        custom_ops.use_library(None)
    if reason is True:
        return made
    print(f"custom operator left out: {operator}: {reason}", flush=True)
    return None
