"""Bodies of requests while they come: their size, their time, and the memory of all together."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive

from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.generation import ClientGone
from fd_dsa.serve.options import ServerOptions

# bodies of the longest allowed size that may be in memory at a time
_LONG_BODIES = 32
# of each body; a request of a usual size is never refused for what others send
_UNCOUNTED_BYTES = 64 << 10
_CLOSE = {"Connection": "close"}


class BodyMemory:
    """Counts the bytes of the bodies in memory; used in the event loop alone.

    Args:
        options: limits of a body.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.num_bytes = 0
        self.limit = _LONG_BODIES * options.max_body_bytes


class ReceivedBody:
    """The body of one request; its bytes count until `release`."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._num_counted = 0
        self._content: bytes | None = None

    async def read(self, receive: Receive) -> None:
        """Receive the whole body.

        Raises:
            ApiError: 408, 413, or 429 where the bodies of all requests take too much memory.
            ClientGone: the client left before the end.
        """
        loop = asyncio.get_running_loop()
        timeout_s = self._memory.options.body_timeout_s
        deadline = loop.time() + timeout_s
        content = bytearray()
        more_body = True
        while more_body:
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                late = f"the body did not come within {timeout_s:g} s; send it at once"
                raise ApiError(408, late, headers=_CLOSE) from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            content += message.get("body", b"")
            self._count(len(content))
            more_body = message.get("more_body", False)
        self._content = bytes(content)

    def replayed(self, receive: Receive) -> Receive:
        """`receive` of a request of which the body has not been read yet."""

        async def replay() -> Message:
            content, self._content = self._content, None
            if content is None:
                return await receive()
            return {"type": "http.request", "body": content, "more_body": False}

        return replay

    def release(self) -> None:
        """The request has ended, and its bytes with it."""
        self._memory.num_bytes -= self._num_counted
        self._num_counted = 0

    def _count(self, num_bytes: int) -> None:
        """Count a body that has so many bytes by now."""
        memory = self._memory
        if num_bytes > memory.options.max_body_bytes:
            raise too_long(memory.options)
        added = max(num_bytes - _UNCOUNTED_BYTES, 0) - self._num_counted
        if added > 0 and memory.num_bytes + added > memory.limit:
            raise ApiError(
                429,
                f"the bodies of the requests in work take {memory.num_bytes} bytes, allowed: "
                f"{memory.limit}, {_LONG_BODIES} times --max-body-size; send the request again "
                "later",
                code="too_many_bytes",
                headers={"Retry-After": "1", **_CLOSE},
            )
        memory.num_bytes += added
        self._num_counted += added


def too_long(options: ServerOptions) -> ApiError:
    """The 413 of a long body."""
    limit = options.max_body_bytes
    message = f"the body is longer than {limit} bytes, the --max-body-size of this server"
    return ApiError(413, message, headers=_CLOSE)
