"""Facts of processes from /proc. Each process may end while it is read."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# of a process that has ended, before its file is opened and after
_ENDED = FileNotFoundError, ProcessLookupError


def read(pid: int, name: str) -> str:
    """Return the text of a file of /proc/<pid>, empty if the process has ended."""
    with contextlib.suppress(*_ENDED):
        return Path(f"/proc/{pid}/{name}").read_text()
    return ""


def is_alive(pid: int) -> bool:
    """Return True if a process computes or waits, as a zombie does not."""
    # the state comes after the program's name in brackets, which may hold spaces
    return read(pid, "stat").rpartition(")")[2].split()[:1] not in ([], ["Z"], ["X"])


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have started."""
    found = [pid]
    for parent in found:
        threads: list[str] = []
        with contextlib.suppress(*_ENDED):
            threads = os.listdir(f"/proc/{parent}/task")
        for thread in threads:
            found += map(int, read(parent, f"task/{thread}/children").split())
    return found[1:]
