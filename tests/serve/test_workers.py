"""Work of requests in few threads: in its order, and not for clients that have left."""

from __future__ import annotations

import asyncio
import threading
from itertools import pairwise
from typing import Any

import pytest

from fd_dsa.cancellation import Cancelled, check_cancelled
from fd_dsa.serve.workers import ClientGone, Turns, Workers
from tests.serve.conftest import TIMEOUT_S


class Client:
    """The part of a request that reports whether its client is there."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        """Return when the client has left."""
        await self.left.wait()
        return {"type": "http.disconnect"}


def test_work_of_clients_that_left_is_dropped_and_the_rest_is_done() -> None:
    async def check() -> None:
        workers = Workers("test", 1)
        go_on, done = threading.Event(), list[str]()

        def work(name: str) -> str:
            assert go_on.wait(TIMEOUT_S)
            assert threading.current_thread().name.startswith("fd_dsa-test")
            done.append(name)
            return name

        client: Any = Client()
        leaving: Any = Client()
        first = asyncio.create_task(workers.run(work, "first", request=client))
        await asyncio.sleep(0)
        gone = asyncio.create_task(workers.run(work, "gone", request=leaving))
        last = asyncio.create_task(workers.run(work, "last", request=client))
        streamed = asyncio.create_task(workers.run(work, "streamed"))
        # short work does not wait for a thread
        assert await workers.run(len, "abc", is_short=True) == 3
        leaving.left.set()
        with pytest.raises(ClientGone):
            await gone
        assert done == []
        go_on.set()
        assert await asyncio.gather(first, last, streamed) == ["first", "last", "streamed"]
        assert sorted(done) == ["first", "last", "streamed"]
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                await workers.run(lambda: 1 // 0)
        workers.close()

    asyncio.run(asyncio.wait_for(check(), TIMEOUT_S))


def test_running_work_ends_when_its_client_leaves() -> None:
    async def check() -> None:
        workers = Workers("test", 1)
        errors, running = list[BaseException](), asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            loop.call_soon_threadsafe(running.set)
            try:
                while True:
                    check_cancelled()
            except Cancelled as error:
                errors.append(error)
                raise

        leaving: Any = Client()
        gone = asyncio.create_task(workers.run(work, request=leaving))
        await running.wait()
        running.clear()
        leaving.left.set()
        with pytest.raises(ClientGone):
            await gone
        # a caller that is cancelled needs the result no more either
        cancelled = asyncio.create_task(workers.run(work))
        await running.wait()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        # the thread is free again, for work that is not cancelled
        assert await workers.run(lambda: check_cancelled() or "done") == "done"
        assert len(errors) == 2
        workers.close()

    asyncio.run(asyncio.wait_for(check(), TIMEOUT_S))


def test_requests_that_come_at_once_begin_one_by_one() -> None:
    async def check() -> None:
        turns, begun = Turns(), list[int]()

        async def begin(number: int) -> None:
            await turns.wait()
            begun.append(number)

        tasks = [asyncio.create_task(begin(number)) for number in range(20)]
        tasks[5].cancel()
        numbers = list[int]()
        while len(begun) < 19:
            numbers.append(len(begun))
            await asyncio.sleep(0)
        assert begun == [number for number in range(20) if number != 5]
        # no turn of the event loop begins more than one
        assert all(after - before <= 1 for before, after in pairwise(numbers))
        await asyncio.gather(*tasks, return_exceptions=True)
        await turns.wait()

    asyncio.run(asyncio.wait_for(check(), TIMEOUT_S))
