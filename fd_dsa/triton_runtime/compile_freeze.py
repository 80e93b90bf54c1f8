"""Detection of compilations after the warm-up, which are a warning or an error."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fd_dsa.errors import LaunchError
from fd_dsa.triton_runtime.compiler import Argument

_LOG = logging.getLogger("fd_dsa.triton_runtime")
_state = threading.local()
_frozen: str | None = None
_late = 0
_on_late: Callable[[], None] | None = None


def freeze(*, strict: bool = False, on_late: Callable[[], None] | None = None) -> None:
    """End the warm-up. Launches should neither compile nor load from now on.

    A launch that still has to logs a warning with the kernel and its arguments, and continues: a
    slow step is better than a failed request. `num_late_compilations` counts such launches.

    Args:
        strict: raise LaunchError instead, for tests and for checks before a release.
        on_late: called for each such launch, in its thread.
    """
    global _frozen, _on_late
    _frozen, _on_late = "strict" if strict else "warn", on_late


def unfreeze() -> None:
    """Allow compilation again, for another warm-up."""
    global _frozen
    _frozen = None


def num_late_compilations() -> int:
    """Return the number of launches after `freeze` that had to compile or load."""
    return _late


@contextmanager
def warming() -> Iterator[None]:
    """Compile without a warning inside, in this thread, even after `freeze`."""
    before = getattr(_state, "warming", False)
    _state.warming = True
    try:
        yield
    finally:
        _state.warming = before


def announce_compilation(
    kernel: str, arguments: Mapping[str, Argument], options: Mapping[str, object]
) -> None:
    """Report that a launch is about to compile or load.

    After `freeze()` and outside `warming()` it is a late compilation.

    Raises:
        LaunchError: after `freeze(strict=True)`.
    """
    global _late
    if _frozen is None or getattr(_state, "warming", False):
        return
    types = ", ".join(
        f"{name}={argument.value!r}"
        if argument.is_constant
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
    if _on_late is not None:
        _on_late()
    _LOG.warning("%s; this step compiles", problem)
