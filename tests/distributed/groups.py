"""Groups whose ranks are threads: the same memory and signals as between processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fd_dsa.distributed.host import HostGroup, Shared


def on_ranks(size: int, work: Callable[[HostGroup], Any]) -> list[Any]:
    """Return the result of `work` on each rank of a new group."""
    shared = Shared.create(size)
    groups = [HostGroup(rank, shared) for rank in range(size)]
    try:
        with ThreadPoolExecutor(size) as threads:
            running = [threads.submit(work, group) for group in groups]
            return [one.result(timeout=60) for one in running]
    finally:
        groups[0].close()
