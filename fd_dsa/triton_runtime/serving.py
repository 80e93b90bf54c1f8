"""No step compiles unnoticed: after `freeze()` a compilation is an event, or an error."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fd_dsa.errors import LaunchError

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
    """How many launches after `freeze` had to compile, to load, or to go untuned."""
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


def serves() -> bool:
    """True after `freeze()`, outside `warming()`."""
    return _frozen is not None and not getattr(_state, "warming", False)


def announce(kernel: str, problem: str, consequence: str) -> None:
    """Called while serving, before a launch does what the warm-up should have done.

    Raises:
        LaunchError: after `freeze(strict=True)`.
    """
    global _late
    if _frozen == "strict":
        raise LaunchError(f"kernel {kernel}: {problem}")
    _late += 1
    _LOG.warning("kernel %s: %s; %s", kernel, problem, consequence)


def announce_compilation(kernel: str, arguments: Mapping[str, Any], options: Any) -> None:
    """Called before a launch compiles or loads.

    Raises:
        LaunchError: after `freeze(strict=True)`.
    """
    if serves():
        types = ", ".join(
            f"{name}={argument.value!r}"
            if argument.type == "constexpr"
            else f"{name}={argument.type}{' (divisible by 16)' if argument.divisible else ''}"
            for name, argument in arguments.items()
        )
        problem = f"no compiled variant for ({types}) with {dict(options)} after freeze()"
        announce(kernel, f"{problem}; add it to the warm-up", "this step compiles")
