"""The kernels of custom_ops/ for torch tensors, built here if nvcc is."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from custom_ops.build_library import BuildError, build_library
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
        operator: choice.provider == CUSTOM_OP or choice.rejected[CUSTOM_OP]
        for operator, choice in choices.items()
        if choice.provider == CUSTOM_OP or CUSTOM_OP in choice.rejected
    }
