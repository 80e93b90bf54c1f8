"""Bodies of requests while they come: their size, their time, and the memory of all together."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive

from fd_dsa.serve.body_scan import BodyScan
from fd_dsa.serve.disconnect import ClientGone
from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.options import ServerOptions

# bodies of the longest allowed size that may be in memory at a time
_LONG_BODIES = 8
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
        self._num_received = 0
        self._num_counted = 0
        self._content: bytearray | None = None

    async def read(self, receive: Receive) -> None:
        """Receive the whole body.

        Raises:
            ApiError: 408, 413, 400 where it nests too deeply, or 429 where the bodies of all
                requests take too much memory.
            ClientGone: the client left before the end.
        """
        options = self._memory.options
        deadline = asyncio.get_running_loop().time() + options.body_timeout_s
        scan = BodyScan(options.max_body_values)
        content = bytearray()
        refusal: ApiError | None = None
        more_body = True
        while more_body:
            part, more_body = await self._next_part(receive, deadline)
            self._num_received += len(part)
            self._count()
            if refusal is not None:
                # most clients read an answer only when they have sent everything
                continue
            try:
                scan.feed(part)
            except ApiError as error:
                refusal = error
                content.clear()
            else:
                content += part
        if refusal is not None:
            raise refusal
        self._content = content

    async def _next_part(self, receive: Receive, deadline: float) -> tuple[bytes, bool]:
        """The next bytes, and whether more follow."""
        try:
            message = await asyncio.wait_for(
                receive(), deadline - asyncio.get_running_loop().time()
            )
        except asyncio.TimeoutError:
            late = f"the body did not come within {self._memory.options.body_timeout_s:g} s"
            raise ApiError(408, f"{late}; send it at once", headers=_CLOSE) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message.get("body", b""), message.get("more_body", False)

    def replayed(self, receive: Receive) -> Receive:
        """`receive` of a request of which the body has not been read yet."""

        async def replay() -> Message:
            content, self._content = self._content, None
            if content is None:
                return await receive()
            return {"type": "http.request", "body": bytes(content), "more_body": False}

        return replay

    def release(self) -> None:
        """The request has ended, and its bytes with it."""
        self._memory.num_bytes -= self._num_counted
        self._num_counted = 0

    def _count(self) -> None:
        """Count what has been received by now."""
        memory, num_bytes = self._memory, self._num_received
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
