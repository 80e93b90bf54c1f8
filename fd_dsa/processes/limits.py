"""Limits of this process that the kernel enforces, for work that cannot be interrupted."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# a timer of 0 would be disabled
_SHORTEST_S = 0.001


def address_space() -> int:
    """Return the size of this process's address space, bytes."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    return num_pages * resource.getpagesize()


def limit_address_space(num_bytes: int) -> None:
    """Bound the address space of this process, so that larger allocations fail."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    is_bounded = hard != resource.RLIM_INFINITY
    soft = min(num_bytes, hard) if is_bounded else num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def expect_end() -> None:
    """Write no core file, and end before other processes if the system is out of memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """End the process if the block takes more processor time."""
    signal.setitimer(signal.ITIMER_PROF, max(seconds, _SHORTEST_S))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
