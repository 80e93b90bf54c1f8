"""Bodies of requests: received within their limits, then parsed and checked off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.responses import Response
from starlette.types import Receive

from fd_dsa.serve.body_scan import BodyScan
from fd_dsa.serve.errors import ApiError, show, unreadable, validation_refusal
from fd_dsa.serve.options import ServerOptions
from fd_dsa.serve.protocol.fields import Body
from fd_dsa.serve.state import ServerState
from fd_dsa.serve.workers import ClientGone

# bodies of the longest allowed size that may be in memory at a time
_LONG_BODIES = 8
# of each body; a request of a usual size is never refused for what others send
_UNCOUNTED_BYTES = 64 << 10
_CLOSE = {"Connection": "close"}
# read on the event loop, in less than a millisecond
_SHORT_BYTES = 8192
# longest body that Python's parser gets, which is slower and knows more than orjson
_LENIENT_BYTES = 1 << 16


class BodyReader:
    """Receives bodies and bounds their sizes, their time, and the memory of all together.

    Used in the event loop alone.

    Args:
        options: limits of a body.

    Attributes:
        num_bytes: counted bytes of the bodies in memory.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.num_bytes = 0
        self._options = options
        self._limit = _LONG_BODIES * options.max_body_bytes

    async def read(self, receive: Receive, held: contextlib.ExitStack) -> bytearray:
        """A whole body, whose bytes count until `held` is closed.

        Raises:
            ApiError: 408, 413, 400 where it nests too deeply, or 429 where the bodies of all
                requests take too much memory.
            ClientGone: the client left before the end.
        """
        deadline = asyncio.get_running_loop().time() + self._options.body_timeout_s
        scan = BodyScan(self._options.max_body_values)
        content = bytearray()
        num_received = num_counted = 0
        refusal: ApiError | None = None
        more_body = True

        def release() -> None:
            self.num_bytes -= num_counted

        held.callback(release)
        while more_body:
            part, more_body = await self._next_part(receive, deadline)
            num_received += len(part)
            added = max(num_received - _UNCOUNTED_BYTES, 0) - num_counted
            self._count(num_received, added)
            num_counted += added
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
        return content

    async def _next_part(self, receive: Receive, deadline: float) -> tuple[bytes, bool]:
        """The next bytes, and whether more follow."""
        try:
            message = await asyncio.wait_for(
                receive(), deadline - asyncio.get_running_loop().time()
            )
        except asyncio.TimeoutError:
            late = f"the body did not come within {self._options.body_timeout_s:g} s"
            raise ApiError(408, f"{late}; send it at once", headers=_CLOSE) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message.get("body", b""), message.get("more_body", False)

    def _count(self, num_received: int, added: int) -> None:
        """Count further bytes of a body of which so many have come."""
        if num_received > self._options.max_body_bytes:
            raise too_long(self._options)
        if added > 0 and self.num_bytes + added > self._limit:
            raise ApiError(
                429,
                f"the bodies of the requests in progress take {self.num_bytes} bytes, allowed: "
                f"{self._limit}, {_LONG_BODIES} times --max-body-size; send the request again "
                "later",
                code="too_many_bytes",
                headers={"Retry-After": "1", **_CLOSE},
            )
        self.num_bytes += added


def too_long(options: ServerOptions) -> ApiError:
    """The 413 of a long body."""
    limit = options.max_body_bytes
    message = f"the body is longer than {limit} bytes, the --max-body-size of this server"
    return ApiError(413, message, headers=_CLOSE)


class BodyRoute(APIRoute):
    """A route whose endpoint has the parameters `body` (a `Body`), `request` and `state`.

    FastAPI makes the OpenAPI document from them. It would also parse and check bodies on the
    event loop, where a long one stops every stream and probe, so that is done here, with the bytes
    that the guard has put into `request.state.body`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        endpoint = self.endpoint
        model: type[Body] = get_type_hints(endpoint)["body"]

        async def handle(request: Request) -> Response:
            state: ServerState = request.app.state.server
            contents: list[bytearray] = request.state.body
            kind = request.headers.get("content-type", "")
            is_short = len(contents[0]) <= _SHORT_BYTES
            body = await state.workers.run(
                read_body, model, contents, kind, request=request, is_short=is_short
            )
            answer: Response = await endpoint(body=body, request=request, state=state)
            return answer

        return handle


def read_body(model: type[Body], contents: list[bytearray], kind: str) -> Body:
    """The checked body of a request.

    Args:
        model: of the body.
        contents: its bytes, which are taken out of the list, so that they go when they are parsed.
        kind: the Content-Type.

    Raises:
        ApiError: 400, the body cannot be read, or a field is wrong or cannot be honoured.
    """
    content = contents.pop()
    if not content:
        raise ApiError(400, "body is empty; send a JSON object")
    if not _is_json(kind):
        message = f"Content-Type is {kind!r}; send JSON with Content-Type: application/json"
        raise ApiError(400, message)
    try:
        value = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise unreadable(error) from error
    if not isinstance(value, dict):
        raise ApiError(400, f"body: got {show(value)}; send a JSON object")
    try:
        body = model.model_validate(value)
    except ValidationError as error:
        raise validation_refusal(error) from error
    body.check_supported()
    return body


def _is_json(kind: str) -> bool:
    """Whether a Content-Type is of JSON, as FastAPI reads it."""
    main, _, sub = kind.partition(";")[0].strip().lower().partition("/")
    return main == "application" and (sub == "json" or sub.endswith("+json"))


def parse_json(content: bytes | bytearray) -> Any:
    """The value of a JSON text.

    orjson holds the interpreter for a third of the time; what it refuses in a short body, such as
    NaN, half of a surrogate pair or UTF-16, Python's parser decides, so that the field is named.

    Raises:
        ValueError, RecursionError: it is none.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        if len(content) <= _LENIENT_BYTES:
            return json.loads(content)
        # raises where it is no UTF-8, and names the byte
        content.decode()
        raise
