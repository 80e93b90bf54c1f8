"""Memory of a process: one heap of glibc for all threads, which is trimmed, and frozen objects."""

from __future__ import annotations

import ctypes
import gc
import threading
import time

from fd_dsa.environment import set_heaps

# parameter of mallopt(3)
_M_ARENA_MAX = -8
_NUM_ARENAS = 1
TRIM_EVERY_S = 10.0
"""Seconds between two calls of malloc_trim."""


def share_heap() -> bool:
    """Limit this process to one heap. Call it before the first thread starts.

    By default each thread gets its own heap, up to eight for each processor. Many threads parse
    bodies, render templates and compile grammars, and each leaves holes in its heap. Also,
    `trim_heap` only frees the end of the first heap. `python -m tests.soak.siege` measures the
    effect; MALLOC_ARENA_MAX=16 shows it without the limit.

    Returns:
        False if the environment sets the number of heaps, or the allocator is not glibc's.

    Source: mallopt(3), M_ARENA_MAX.
    """
    return set_heaps("arena_max", _M_ARENA_MAX, _NUM_ARENAS)


def trim_heap() -> None:
    """Return free pages to the system.

    glibc itself only returns the end of a heap, so one living tensor or string keeps all freed
    memory before it. The call takes about 10 ms and does not hold the GIL.

    Source: malloc_trim(3).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_heap_trimmed() -> None:
    """Start a thread that calls `trim_heap` every ten seconds until the process ends."""

    def work() -> None:
        while True:
            time.sleep(TRIM_EVERY_S)
            trim_heap()

    threading.Thread(target=work, name="heap", daemon=True).start()


def freeze_objects() -> None:
    """Leave the objects of now out of every later garbage collection.

    A full collection holds the GIL, and so every stream, for a time that grows with the number of
    objects. A started server has 94,000, and 2,000 connections at once come to as many again.

    Source: documentation of Python's `gc.freeze`.
    """
    gc.collect()
    gc.freeze()
