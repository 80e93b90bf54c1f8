"""The few threads that do the long work of requests, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request

from fd_dsa.serve.disconnect import unless_gone

_T = TypeVar("_T")


class Workers:
    """Runs work of requests in order of arrival, so much at a time; used in one event loop.

    Args:
        name: of the threads.
        num_threads: few, since each that runs Python makes the event loop wait longer for the
            interpreter.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, f"fd_dsa-{name}")
        self._free = asyncio.Semaphore(num_threads)

    async def run(
        self,
        work: Callable[..., _T],
        *args: Any,
        request: Request | None = None,
        is_short: bool = False,
    ) -> _T:
        """The result of `work(*args)`, run in one of the threads.

        Args:
            work: what to run.
            args: its arguments.
            request: whose work it is; while all threads are busy its client is watched. None
                where the caller is cancelled when the client goes away.
            is_short: less work than the way to a thread; run at once, on the event loop.

        Raises:
            ClientGone: the client closed the connection before a thread was free.
        """
        if is_short:
            return work(*args)
        if request is not None and self._free.locked():
            await unless_gone(request, self._free.acquire())
        else:
            await self._free.acquire()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        finally:
            self._free.release()

    def close(self) -> None:
        """Take no more work; what runs comes to its end."""
        self._threads.shutdown(wait=False)
