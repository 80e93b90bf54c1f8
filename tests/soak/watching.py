"""Views of a server from outside: gaps of a stream, time of a probe, memory.

All in one event loop whose tasks do next to nothing, so that its clock is not held up; what is
heavy must run in another process.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx

from tests import proc
from tests.proc import children

EVERY_S = 0.05
# a server that takes more is killed, so that the machine of the test lives
MOST_BYTES = 6 * 2**30
# of an anonymous mapping at the start: what the memory plan has, weights and caches
PLANNED_BYTES = 100 * 2**20
PAGE_BYTES = resource.getpagesize()


class Spans:
    """Spans of time that have ended, and the one that has not.

    Attributes:
        ended: begin and end of each, seconds of the monotonic clock.
        begin: of the one that has not ended; None where there is none.
    """

    def __init__(self) -> None:
        self.ended: list[tuple[float, float]] = []
        self.begin: float | None = None

    def next(self) -> None:
        """End the span, and begin the next one."""
        now = time.monotonic()
        if self.begin is not None:
            self.ended.append((self.begin, now))
        self.begin = now

    def stop(self) -> None:
        """End the span; no other begins."""
        self.next()
        self.begin = None

    def longest_s(self, since: float) -> float:
        """Seconds of the longest span that reaches past `since`, the open one as long as it is."""
        spans = [end - begin for begin, end in self.ended if end >= since]
        if self.begin is not None:
            spans.append(time.monotonic() - self.begin)
        return max(spans, default=0.0)

    def has_stalled(self, seconds: float) -> bool:
        """True where the open span is longer than that."""
        return self.begin is not None and time.monotonic() - self.begin > seconds


class Memory:
    """Resident memory of a process and its descendants, and how much of it was planned.

    Planned are the large mappings that the process has when it is ready: their pages become
    resident when a cache block is first written, which is no growth.

    Args:
        pid: of the process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._processes = [pid, *children(pid)]
        self._planned = {
            (process, begin): end - begin
            for process in self._processes
            for begin, end, _ in _mappings(process)
            if end - begin >= PLANNED_BYTES
        }
        self.peak = 0

    def sample(self, look_for_processes: bool) -> None:
        """Take the memory of now into `peak`, bytes."""
        if look_for_processes:
            self._processes = [self._pid, *children(self._pid)]
        self.peak = max(self.peak, self.resident())

    def resident(self) -> int:
        """Bytes of all processes."""
        return sum(map(_resident, self._processes))

    def planned(self) -> int:
        """Those of them that are in mappings which were planned."""
        return sum(
            min(resident, self._planned[process, begin])
            for process in {process for process, _ in self._planned}
            for begin, _, resident in _mappings(process)
            if (process, begin) in self._planned
        )


def _resident(pid: int) -> int:
    """Resident bytes of a process, 0 if it has ended; a page of several processes is shared out."""
    lines = proc.read(pid, "smaps_rollup").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _mappings(pid: int) -> list[tuple[int, int, int]]:
    """Begin, end and resident bytes of the anonymous mappings that can be written."""
    found = []
    is_anonymous = False
    for line in proc.read(pid, "smaps").splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            is_anonymous = rest[0] == "rw-p" and len(rest) == 4
            begin, end = (int(part, 16) for part in name.split("-"))
        elif name == "Rss:" and is_anonymous:
            found.append((begin, end, int(rest[0]) * 1024))
    return found


class Watch:
    """Reads one stream after the other, probes /health and samples the memory, until it is left.

    Args:
        url: of the server.
        pid: of its process, the first of its group.
        body: of POST /v1/completions, a long stream.

    Attributes:
        tokens: a span lasts from one piece of a stream to the next.
        probes: a span lasts from the connection to the whole answer of /health.
        faults: probes that were not a 200, and streams that did not come to their end.
        memory: of the server.
    """

    def __init__(self, url: str, pid: int, body: dict[str, Any]) -> None:
        self.tokens, self.probes = Spans(), Spans()
        self.faults: list[str] = []
        self.memory = Memory(pid)
        self._url, self._pid, self._body = url, pid, body
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Watch:
        work = (self._read_streams, self._probe, self._sample)
        self._tasks = [asyncio.create_task(one()) for one in work]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the condition holds, at most so long; whether it does."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            await asyncio.sleep(EVERY_S)
        return condition()

    async def _read_streams(self) -> None:
        """One stream after the other."""
        async with httpx.AsyncClient(base_url=self._url, timeout=None) as client:
            while True:
                last = ""
                try:
                    body = {**self._body, "stream": True}
                    async with client.stream("POST", "/v1/completions", json=body) as answer:
                        async for line in answer.aiter_lines():
                            if line.startswith("data: {"):
                                self.tokens.next()
                            last = line or last
                except httpx.HTTPError as error:
                    last = repr(error)
                self.tokens.stop()
                if last != "data: [DONE]":
                    self.faults.append(f"a stream ended with {last:.500}")
                    await asyncio.sleep(EVERY_S)

    async def _probe(self) -> None:
        """One probe after the other, each on a connection of its own."""
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self._url, timeout=None, limits=limits) as client:
            while True:
                self.probes.next()
                try:
                    answer = await client.get("/health")
                    fault = "" if answer.status_code == 200 else answer.text
                except httpx.HTTPError as error:
                    fault = repr(error)
                self.probes.stop()
                if fault:
                    self.faults.append(f"/health: {fault:.200}")
                await asyncio.sleep(EVERY_S)

    async def _sample(self) -> None:
        """The memory, and now and then the processes."""
        for number in range(10**9):
            self.memory.sample(look_for_processes=number % 10 == 0)
            if self.memory.resident() > MOST_BYTES:
                self.faults.append(f"killed with {self.memory.peak / 2**30:.1f} GiB resident")
                os.killpg(self._pid, signal.SIGKILL)
                return
            await asyncio.sleep(EVERY_S)
