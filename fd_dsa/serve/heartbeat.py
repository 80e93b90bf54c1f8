"""Comments in quiet event streams, which keep proxies and clients connected."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Message, Receive, Send

from fd_dsa.serve.workers import cancel

PING = b": ping\n\n"
"""A comment of server-sent events, ignored by clients."""


@contextlib.asynccontextmanager
async def pinging(
    receive: Receive, send: Send, interval_s: float
) -> AsyncIterator[tuple[Receive, Send]]:
    """Send `PING` in pauses of a response, and when its client closes its sending side.

    Pings begin after the head of the response and end with its last message.

    Args:
        receive: of the ASGI server, after the whole body.
        send: of the ASGI server.
        interval_s: length of a pause, seconds. 0 = no pings.

    Yields:
        The `receive` and `send` functions for the response.
    """
    if not interval_s:
        yield receive, send
        return
    heartbeat = _Heartbeat(receive, send, interval_s)
    task = asyncio.create_task(heartbeat.run())
    try:
        yield heartbeat.receive, heartbeat.send
    finally:
        await cancel([task])


class _Heartbeat:
    """The messages of one response and the pings between them."""

    def __init__(self, receive: Receive, send: Send, interval_s: float) -> None:
        self._receive, self._send, self._interval_s = receive, send, interval_s
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        # a ping must not overtake a message that waits for a slow client
        self._lock = asyncio.Lock()
        self._is_open = False

    async def receive(self) -> Message:
        """Receive a message.

        A client that has finished sending is pinged, to see if it is alive.
        """
        message = await self._receive()
        if message["type"] == "http.request":
            await self._ping()
        return message

    async def send(self, message: Message) -> None:
        """Send a message of the response."""
        async with self._lock:
            is_head = message["type"] == "http.response.start"
            self._is_open = is_head or message.get("more_body", False)
            self._last = self._loop.time()
            await self._send(message)

    async def run(self) -> None:
        """Ping until the task is cancelled."""
        while True:
            quiet_s = self._loop.time() - self._last
            if quiet_s < self._interval_s:
                await asyncio.sleep(self._interval_s - quiet_s)
            else:
                await self._ping()

    async def _ping(self) -> None:
        """Send a ping if the response is open."""
        async with self._lock:
            self._last = self._loop.time()
            if self._is_open:
                ping = {"type": "http.response.body", "body": PING, "more_body": True}
                await self._send(ping)
