"""Heaps of glibc's allocator, so that a long-lived server gives freed memory back."""

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
    """Let the threads of this process share two heaps; before it starts any.

    By default each thread gets a heap of its own, up to eight for each processor. Bodies are
    parsed and grammars compiled by many threads, each of which leaves holes in its own heap.
    `python -m tests.soak.fuzz` prints what that comes to; MALLOC_ARENA_MAX=16 shows it without.

    Returns:
        False where the environment says how many there are to be, or the allocator is not glibc's.

    Source: mallopt(3), M_ARENA_MAX.
    """
    return set_heaps("arena_max", _M_ARENA_MAX, _NUM_ARENAS)


def trim_heaps() -> None:
    """Give free pages back to the system.

    By itself glibc gives back no more than the end of a heap: one tensor or text that lives keeps
    what was freed before it. Takes about 10 ms, and not the GIL.

    Source: malloc_trim(3).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_heaps_trimmed() -> None:
    """`trim_heaps` every ten seconds, in a thread of its own, until the process ends."""

    def work() -> None:
        while True:
            time.sleep(TRIM_EVERY_S)
            trim_heaps()

    threading.Thread(target=work, name="heaps", daemon=True).start()
