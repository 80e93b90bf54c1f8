"""Server-sent events: one `data: {json}` line per chunk, `data: [DONE]` at the end."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fd_dsa.serve.errors import ApiError, internal_error

_DONE = b"data: [DONE]\n\n"

logger = logging.getLogger("fd_dsa.serve")


class EventStream(StreamingResponse):
    """Streams chunks, and closes their generators however the response ends.

    A client that goes away therefore aborts its requests at once, not when a generator happens
    to be collected. An exception inside the stream becomes one error event before `[DONE]`.

    Args:
        chunks: JSON-serialisable objects.
        request_id: for the log line of a failure.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], request_id: str) -> None:
        self._chunks, self._events = chunks, _events(chunks, request_id)
        super().__init__(
            self._events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generator in (self._events, self._chunks):
                await generator.aclose()


async def _events(
    chunks: AsyncGenerator[dict[str, Any], None], request_id: str
) -> AsyncGenerator[bytes, None]:
    """The bytes of the stream."""
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except ApiError as error:
        yield _event(error.body())
    except Exception:
        logger.exception("request %s failed while streaming", request_id)
        yield _event(internal_error(request_id).body())
    yield _DONE


def _event(chunk: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(chunk) + b"\n\n"
