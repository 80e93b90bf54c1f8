"""No step compiles unnoticed: after `freeze()` a compilation is an event, or an error."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fd_dsa.errors import LaunchError
from fd_dsa.triton_runtime.compiler import Argument

_LOG = logging.getLogger("fd_dsa.triton_runtime")
_state = threading.local()
_frozen: str | None = None
_late = 0


def freeze(*, strict: bool = False) -> None:
    """Say that warm-up is over, and that no launch should have to compile or load from now on.

    A launch that has to do it all the same logs a warning with the kernel and its arguments, once,
    and goes on: a slow step is better than a failed request. `num_late_compilations` counts them.

    Args:
        strict: raise LaunchError instead; for tests and for checks before a release.
    """
    global _frozen
    _frozen = "strict" if strict else "warn"


def unfreeze() -> None:
    """Allow compilation again, for another warm-up."""
    global _frozen
    _frozen = None


def num_late_compilations() -> int:
    """How many launches after `freeze` had to compile, or to load."""
    return _late


@contextmanager
def warming() -> Iterator[None]:
    """Compile without notice inside, in this thread, even after `freeze`."""
    before = getattr(_state, "warming", False)
    _state.warming = True
    try:
        yield
    finally:
        _state.warming = before


def announce_compilation(
    kernel: str, arguments: Mapping[str, Argument], options: Mapping[str, object]
) -> None:
    """Called before a launch compiles or loads: after `freeze()`, outside `warming()`, it counts.

    Raises:
        LaunchError: after `freeze(strict=True)`.
    """
    global _late
    if _frozen is None or getattr(_state, "warming", False):
        return
    types = ", ".join(
        f"{name}={argument.value!r}"
        if argument.type == "constexpr"
        else f"{name}={argument.type}{' (divisible by 16)' if argument.divisible else ''}"
        for name, argument in arguments.items()
    )
    problem = (
        f"kernel {kernel}: no compiled variant for ({types}) with {dict(options)} after freeze(); "
        "add it to the warm-up"
    )
    if _frozen == "strict":
        raise LaunchError(problem)
    _late += 1
    _LOG.warning("%s; this step compiles", problem)
