"""From the bytes of a request to the checked model of its body, beside the event loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from fd_dsa.serve.disconnect import ClientGone
from fd_dsa.serve.errors import ApiError, show, unreadable, validation_refusal
from fd_dsa.serve.protocol.fields import Body
from fd_dsa.serve.state import ServerState

# read on the event loop, in less than a millisecond
_SHORT_BYTES = 8192
# longest body that Python's parser gets, which is slower and knows more than orjson
_LENIENT_BYTES = 1 << 16


class BodyRoute(APIRoute):
    """A route whose endpoint has the parameters `body` (a `Body`), `request` and `state`.

    FastAPI makes the OpenAPI document from them. It would also parse and check bodies on the
    event loop, where a long one stops every stream and probe, so that is done here.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        endpoint = self.endpoint
        model: type[Body] = get_type_hints(endpoint)["body"]

        async def handle(request: Request) -> Response:
            state: ServerState = request.app.state.server
            kind = request.headers.get("content-type", "")
            try:
                chunks = [chunk async for chunk in request.stream()]
            except ClientDisconnect:
                raise ClientGone from None
            is_short = sum(map(len, chunks)) <= _SHORT_BYTES
            body = await state.workers.run(
                read_body, model, chunks, kind, request=request, is_short=is_short
            )
            answer: Response = await endpoint(body=body, request=request, state=state)
            return answer

        return handle


def read_body(model: type[Body], chunks: list[bytes], kind: str) -> Body:
    """The checked body of a request.

    Args:
        model: of the body.
        chunks: its bytes, which the list lets go.
        kind: the Content-Type.

    Raises:
        ApiError: 400, the body cannot be read, or a field is wrong or cannot be honoured.
    """
    content = b"".join(chunks)
    chunks.clear()
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


def parse_json(content: bytes) -> Any:
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
