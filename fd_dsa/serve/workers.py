"""Worker threads for requests, whose work is cancelled when the client disconnects."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from fastapi import Request

from fd_dsa.cancellation import cancelled_by

_T = TypeVar("_T")


class ClientGone(Exception):
    """The client closed the connection before the answer was ready."""


async def unless_gone(request: Request, work: Coroutine[None, None, _T]) -> _T:
    """Return the result of `work`, or cancel it when the client disconnects.

    Raises:
        ClientGone: the client closed the connection.
    """

    async def wait_until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work)
    gone = asyncio.create_task(wait_until_gone())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await cancel([task, gone])
        # the traceback of its error has this frame
        del task


async def cancel(tasks: Sequence[asyncio.Task[object]]) -> None:
    """Cancel the tasks and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Turns:
    """Admits one request per turn of the event loop, in order of arrival.

    If thousands of requests arrive at once, their connections are accepted before most of them
    begin. So a probe, which needs no turn, does not wait for their work.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return when it is the caller's turn."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_soon(self._next, loop)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        turn = self._waiting.popleft()
        if not turn.done():
            turn.set_result(None)
        if self._waiting:
            loop.call_soon(self._next, loop)


class Workers:
    """Runs work of requests in order of arrival, `num_threads` at a time.

    Args:
        num_threads: few, because each thread that runs Python delays the event loop.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, f"fd_dsa-{name}")
        self._free = asyncio.Semaphore(num_threads)

    async def run(
        self,
        work: Callable[..., _T],
        *args: object,
        request: Request | None = None,
        is_short: bool = False,
    ) -> _T:
        """Return the result of `work(*args)`, run in one of the threads.

        Args:
            request: the request of the work. Its client is watched while the work waits and runs.
                None if the caller itself is cancelled when the client disconnects.
            is_short: True runs the work at once on the event loop, because a thread would take
                longer.

        Raises:
            ClientGone: the client closed the connection before the work was done. Running work ends
                at its next `check_cancelled`.
        """
        if is_short:
            return work(*args)
        if request is not None and self._free.locked():
            await unless_gone(request, self._free.acquire())
        else:
            await self._free.acquire()
        stop, loop = threading.Event(), asyncio.get_running_loop()

        def cancellable() -> _T:
            with cancelled_by(stop):
                return work(*args)

        future = self._threads.submit(cancellable)
        # release when the work has ended, which may be after its client has left
        future.add_done_callback(lambda _: _call_soon(loop, self._free.release))
        try:
            if request is None:
                return await asyncio.wrap_future(future)
            return await unless_gone(request, _result_of(future))
        finally:
            stop.set()
            # the traceback of its error has this frame
            del future

    def close(self) -> None:
        self._threads.shutdown(wait=False)


async def _result_of(future: Future[_T]) -> _T:
    try:
        return await asyncio.wrap_future(future)
    finally:
        # the traceback of its error has this frame
        del future


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with suppress(RuntimeError):
        # the loop of a stopped server is closed
        loop.call_soon_threadsafe(function)
