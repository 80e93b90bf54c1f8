"""Answers in JSON: one encoder, and large ones in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_T = TypeVar("_T")

# entries that are encoded at a time: a millisecond, and few objects that exist at once
_SLICE = 256
_PIECE_BYTES = 1 << 18


class JsonResponse(Response):
    """An answer of any JSON value; a long one is sent as fast as its client reads.

    Args:
        content: of types that orjson encodes, `orjson.Fragment` among them.
    """

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return orjson.dumps(content)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; the next piece of a long one follows when there is room for it."""
        body = bytes(self.body)
        if len(body) <= _PIECE_BYTES:
            await super().__call__(scope, receive, send)
            return
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        for begin in range(0, len(body), _PIECE_BYTES):
            piece = body[begin : begin + _PIECE_BYTES]
            more = begin + _PIECE_BYTES < len(body)
            await send({"type": "http.response.body", "body": piece, "more_body": more})


def slices(entries: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """The entries in order, some hundred at a time."""
    return (entries[begin : begin + _SLICE] for begin in range(0, len(entries), _SLICE))


def packed(parts: Iterable[Sequence[object]]) -> bytes:
    """The entries of all parts as JSON, with commas between them and without brackets.

    Each part is made and encoded alone, so that few of its objects exist at once, and other
    threads run in between.
    """
    return b",".join(filter(None, (orjson.dumps(part)[1:-1] for part in parts)))


def packed_list(*entries: bytes) -> orjson.Fragment:
    """A JSON list of entries that are `packed`."""
    return orjson.Fragment(b"[" + b",".join(filter(None, entries)) + b"]")
