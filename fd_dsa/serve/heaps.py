"""Heaps of glibc's allocator: few of them, trimmed to return freed memory."""

from __future__ import annotations

import ctypes
import threading
import time

from fd_dsa.environment import set_heaps

# parameter of mallopt(3)
_M_ARENA_MAX = -8
_NUM_ARENAS = 2
TRIM_EVERY_S = 10.0
"""Seconds between two calls of malloc_trim."""


def share_heaps() -> bool:
    """Limit this process to two shared heaps. Call it before the first thread starts.

    By default each thread gets its own heap, up to eight for each processor. Many threads parse
    bodies and compile grammars, and each leaves holes in its heap. `python -m tests.soak.fuzz`
    measures the effect; MALLOC_ARENA_MAX=16 shows it without the limit.

    Returns:
        False if the environment sets the number of heaps, or the allocator is not glibc's.

    Source: mallopt(3), M_ARENA_MAX.
    """
    return set_heaps("arena_max", _M_ARENA_MAX, _NUM_ARENAS)


def trim_heaps() -> None:
    """Return free pages to the system.

    glibc itself only returns the end of a heap, so one living tensor or string keeps all freed
    memory before it. The call takes about 10 ms and does not hold the GIL.

    Source: malloc_trim(3).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_heaps_trimmed() -> None:
    """Start a thread that calls `trim_heaps` every ten seconds until the process ends."""

    def work() -> None:
        while True:
            time.sleep(TRIM_EVERY_S)
            trim_heaps()

    threading.Thread(target=work, name="heaps", daemon=True).start()
