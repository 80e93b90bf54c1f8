"""Request bodies: received within limits, parsed and checked off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, get_type_hints

import numpy as np
import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.responses import Response
from starlette.types import Receive

from fd_dsa.serve.errors import (
    ApiError,
    FieldError,
    field_path,
    show,
    unreadable,
    validation_refusal,
)
from fd_dsa.serve.flags import ServerOptions
from fd_dsa.serve.protocol.fields import Body
from fd_dsa.serve.state import ServerState
from fd_dsa.serve.workers import ClientGone

logger = logging.getLogger("fd_dsa.serve")

MAX_DEPTH = 64
"""Maximum nesting depth of lists and objects. Tool schemas reach about twenty."""

CONTAINER_WEIGHT = 8
"""Weight of a string, a name, a list or an object. A number has weight 1.

After parsing, a number takes 40 bytes and each of the others 80 to 230.
"""

LENIENT_BYTES = 1 << 16
"""Largest body for Python's parser, which is slower than orjson and accepts more."""

MAX_LONG_BODIES = 8
"""Number of bodies of the maximum size that fit into memory together."""
# not counted for each body, so that a request of usual size is not refused because of others
_UNCOUNTED_BYTES = 64 << 10
_CLOSE = {"Connection": "close"}
# bodies up to this size are parsed on the event loop, in less than a millisecond
_SHORT_BYTES = 8192
# bounds for names of unknown fields, which clients choose: in one header, and in the log
_SHOWN_NAMES, _SHOWN_NAME_CHARS, _MAX_LOGGED_NAMES = 16, 64, 256
_logged_names: set[str] = set()
# brackets become their change of depth, int8; all other bytes are deleted
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


async def receive_body(
    state: ServerState, receive: Receive, held: contextlib.ExitStack
) -> bytearray:
    """Receive a whole body.

    `state.num_body_bytes` counts its bytes until `held` closes.

    Raises:
        ApiError: 408 after the time limit, 413 for a long body, 429 if the bodies of all requests
            take too much memory.
        ClientGone: the client disconnected before the end of the body.
    """
    options, loop = state.options, asyncio.get_running_loop()
    deadline = loop.time() + options.body_timeout_s
    limit = MAX_LONG_BODIES * options.max_body_size
    content = bytearray()
    num_counted = 0
    more_body = True

    def release() -> None:
        state.num_body_bytes -= num_counted

    held.callback(release)
    while more_body:
        try:
            message = await asyncio.wait_for(receive(), deadline - loop.time())
        except asyncio.TimeoutError:
            late = f"the body did not come within {options.body_timeout_s:g} s"
            raise ApiError(408, f"{late}; send it at once", headers=_CLOSE) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        content += message.get("body", b"")
        more_body = message.get("more_body", False)
        check_length(len(content), options)
        added = max(len(content) - _UNCOUNTED_BYTES, 0) - num_counted
        if added and state.num_body_bytes + added > limit:
            raise ApiError(
                429,
                f"the bodies of the requests in progress take {state.num_body_bytes} bytes, "
                f"allowed: {limit}, {MAX_LONG_BODIES} times --max-body-size; send the request "
                "again later",
                code="too_many_bytes",
                headers={"Retry-After": "1"},
            )
        state.num_body_bytes += added
        num_counted += added
    return content


def check_length(num_bytes: int, options: ServerOptions) -> None:
    """Raise a 413 for a body longer than --max-body-size."""
    limit = options.max_body_size
    if num_bytes > limit:
        message = f"the body is longer than {limit} bytes, the --max-body-size of this server"
        raise ApiError(413, message)


def check_values(content: bytes | bytearray, max_weight: int) -> None:
    """Refuse a body with too many values before it is parsed.

    Each comma counts 1. Each list, object and string (also field names) counts `CONTAINER_WEIGHT`.
    Invalid JSON is counted by the same rules, and the parser refuses it later.

    Args:
        max_weight: maximum weight of all values, --max-body-values of the server.

    Raises:
        ApiError: 413 for too many values, 400 for a nesting deeper than `MAX_DEPTH`.
    """
    # drop escaped quotation marks, so that the remaining ones delimit strings
    marked = content.replace(rb"\\", b"").replace(rb"\"", b"")
    num_texts = (marked.count(b'"') + 1) // 2
    is_small = CONTAINER_WEIGHT * num_texts <= max_weight
    outside = b"".join(marked.split(b'"')[::2]) if is_small else b""
    num_opened = outside.count(b"[") + outside.count(b"{")
    if CONTAINER_WEIGHT * (num_texts + num_opened) + outside.count(b",") > max_weight:
        raise ApiError(
            413,
            f"the body holds more than {max_weight} values, the --max-body-values of this server; "
            f"each number counts 1, each text, name, list and object {CONTAINER_WEIGHT}",
        )
    # the parser stops at the first unmatched closing bracket, so later bytes do not count
    steps = outside.translate(_STEPS, _NO_BRACKETS)[: 2 * num_opened]
    if np.frombuffer(steps, np.int8).cumsum(dtype=np.int32).max(initial=0) > MAX_DEPTH:
        raise ApiError(
            400,
            f"body nests too deeply: got more than {MAX_DEPTH} lists and objects inside of each "
            "other; send a flatter request",
        )


class BodyRoute(APIRoute):
    """A route whose endpoint has the parameters `body`, `request` and `state`.

    FastAPI makes the OpenAPI document from these parameters. Its own parsing would run on the event
    loop, where a long body stops every stream and probe. So this class parses the bytes that the
    guard has put into `request.state.body`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the coroutine function that answers a request."""
        endpoint = self.endpoint
        model: type[Body] = get_type_hints(endpoint)["body"]

        async def handle(request: Request) -> Response:
            state: ServerState = request.app.state.server
            contents: list[bytearray] = request.state.body
            kind = request.headers.get("content-type", "")
            max_weight = state.options.max_body_values
            is_short = len(contents[0]) <= _SHORT_BYTES
            body = await state.workers.run(
                read_body, model, contents, kind, max_weight, request=request, is_short=is_short
            )
            answer: Response = await endpoint(body=body, request=request, state=state)
            if unknown := body.unknown_fields:
                report_unknown(unknown, answer)
            return answer

        return handle


def report_unknown(names: Sequence[str], answer: Response) -> None:
    """Add the ignored fields to a response header and log each name once.

    Args:
        names: field names, chosen by the client.
    """
    shown = [json.dumps(name[:_SHOWN_NAME_CHARS])[1:-1] for name in names[:_SHOWN_NAMES]]
    answer.headers["X-Ignored-Fields"] = ", ".join(shown)
    for name in shown:
        if name not in _logged_names and len(_logged_names) < _MAX_LOGGED_NAMES:
            _logged_names.add(name)
            logger.warning("the field %s of a request is unknown and ignored", name)


def read_body(model: type[Body], contents: list[bytearray], kind: str, max_weight: int) -> Body:
    """Parse and check the body of a request.

    Args:
        contents: one entry, the bytes. It is removed from the list, so that the bytes are freed
            after parsing.

    Raises:
        ApiError: 400 if the body cannot be read or a field is invalid or unsupported, 413 for too
            many values.
    """
    content = contents.pop()
    if not content:
        raise ApiError(400, "body is empty; send a JSON object")
    # the same media types as FastAPI
    main, _, sub = kind.partition(";")[0].strip().lower().partition("/")
    if main != "application" or not (sub == "json" or sub.endswith("+json")):
        message = f"Content-Type is {kind!r}; send JSON with Content-Type: application/json"
        raise ApiError(400, message)
    check_values(content, max_weight)
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


class _LongInteger(str):
    """The digits of an integer that is too long for Python."""


def _parse_leniently(content: bytes | bytearray) -> Any:
    """Parse a JSON text by Python's parser, whose error of a long integer names no field."""
    try:
        return json.loads(content)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        try:
            value = json.loads(content, parse_int=_read_integer)
        except json.JSONDecodeError:
            raise error from None
    for place, number in _long_integers(value):
        raise FieldError(
            f"{field_path(place) or 'body'}: got an integer of {len(number.lstrip('-'))} digits; "
            f"allowed are at most {sys.get_int_max_str_digits()} digits"
        )
    # a later value of the same name has replaced it
    return value


def _read_integer(text: str) -> int | _LongInteger:
    try:
        return int(text)
    except ValueError:
        return _LongInteger(text)


def _long_integers(
    value: object, place: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], _LongInteger]]:
    """Yield the place and the digits of each long integer, at most `MAX_DEPTH` levels deep."""
    if isinstance(value, _LongInteger):
        yield place, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _long_integers(one, (*place, name))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _long_integers(one, (*place, index))


def parse_json(content: bytes | bytearray) -> Any:
    """Parse a JSON text.

    orjson holds the interpreter lock for a third of the time that Python's parser does. Python's
    parser reads short bodies that orjson refuses (NaN, half of a surrogate pair, UTF-16), so that
    the error names the field.

    Raises:
        ValueError, RecursionError: the text is not valid JSON.
        ApiError: 400 for an integer with more digits than Python reads.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        if len(content) <= LENIENT_BYTES:
            return _parse_leniently(content)
        # raises an error that names the first byte that is not UTF-8
        content.decode()
        raise
