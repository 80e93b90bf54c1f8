"""The parser of a connection: h11 with stricter rules and limits.

h11 accepts requests that a proxy may read differently, so that one request could be smuggled after
another. Examples are Content-Length together with Transfer-Encoding, repeated lengths, lines that
end with LF only, folded lines, control characters, and the same in trailers.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import h11

from fd_dsa.serve.errors import ApiError

MAX_HEAD_BYTES = 32 << 10
"""Longest head of a request: request line and headers."""
MAX_HEADERS = 100
"""Header lines of a request."""
# This many chunks of a body may have any size, and further chunks have this size on average. A
# chunk takes h11 as long as many bytes, and one read brings 256 KiB.
_MANY_CHUNKS = 1024
_MIN_CHUNK_BYTES = 256

# where a head ends for h11
_HEAD_END = re.compile(rb"\n\r?\n")
_BROKEN = re.compile(
    rb"(?P<lf>(?<!\r)\n)|(?P<fold>\r\n[ \t])"
    rb"|(?P<control>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n))"
)
_BROKEN_RULES = {
    "lf": "a line of the head ends with LF only; end lines with CR LF",
    "fold": "a header line is folded; send each header on one line",
    "control": "the head contains a control character; send none",
}
_IS_URL = re.compile(rb"https?:", re.IGNORECASE)
# neither without a host nor with the name of a user
_URL = re.compile(rb"https?://((?:\[[0-9a-f:.]+\]|[^]/?#@:[]+)(?::\d*)?)([/?].*)?", re.IGNORECASE)
_FRAMING = re.compile(rb"\r\n(content-length|transfer-encoding):[ \t]*([^\r]*)", re.IGNORECASE)


class StrictConnection(h11.Connection):
    """A connection that refuses requests by a callback, and then reads no more data.

    Args:
        admit: called with each request whose head is valid; may raise ApiError.
        refuse: called once with the reason when a request is refused. The connection has no events
            after that.
    """

    def __init__(
        self, admit: Callable[[h11.Request], None], refuse: Callable[[ApiError], None]
    ) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._admit = admit
        self._refuse = refuse
        self._num_searched = self._num_chunks = self._num_chunk_bytes = 0

    def drop_callbacks(self) -> None:
        """Forget the callbacks, because no more data comes."""
        self._admit = self._refuse = _ignore

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the client's next event. Exceptions become a refusal."""
        try:
            if self.their_state is h11.IDLE:
                self._check_head()
            event = super().next_event()
            if isinstance(event, h11.Request):
                event = _with_path(event)
                self._admit(event)
            elif isinstance(event, h11.Data):
                self._check_chunk(event)
            elif isinstance(event, h11.EndOfMessage) and event.headers:
                # h11 is lenient with lines of trailers, which have no reader here
                raise _invalid("header lines come after the body; send them before it")
        except ApiError as error:
            self._refuse(error)
        except h11.RemoteProtocolError as error:
            is_long = error.error_status_hint == 431
            # the bytes themselves come after the colon
            self._refuse(_too_long() if is_long else _invalid(str(error).partition(":")[0]))
        else:
            return event
        return h11.NEED_DATA

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """Return the bytes of an event for `send`. Some answers end the connection.

        A client that waits for an interim response may leave out its body after the answer. Its
        next request would then be read as that body.

        Source: RFC 9110, section 10.1.1.
        """
        if isinstance(event, h11.Response) and self.they_are_waiting_for_100_continue:
            headers = [*event.headers.raw_items(), (b"connection", b"close")]
            event = h11.Response(
                status_code=event.status_code, headers=headers, reason=event.reason
            )
        return super().send_with_data_passthrough(event)

    def _check_head(self) -> None:
        """Refuse a complete head that breaks a rule, before h11 parses each of its lines."""
        data = self.trailing_data[0]
        end = _HEAD_END.search(data, self._num_searched)
        if end is None:
            self._num_searched = max(0, len(data) - 2)
        else:
            self._num_searched = self._num_chunks = self._num_chunk_bytes = 0
            check_head(data[: end.end()])

    def _check_chunk(self, event: h11.Data) -> None:
        """Refuse a body that keeps the processor busy with chunks of a few bytes."""
        self._num_chunks += event.chunk_start
        self._num_chunk_bytes += len(event.data)
        if self._num_chunks > _MANY_CHUNKS + self._num_chunk_bytes // _MIN_CHUNK_BYTES:
            raise ApiError(
                400,
                f"the body has more than {_MANY_CHUNKS} chunks, and they are shorter than "
                f"{_MIN_CHUNK_BYTES} bytes; send longer ones",
            )


def _ignore(_: h11.Request | ApiError) -> None:
    """Take the place of a callback after the end of a connection."""


def check_head(head: bytes) -> None:
    """Check the head of a request before h11 parses it.

    Raises:
        ApiError: 400, or 431 for a head that is too long or has too many headers.

    Source: RFC 9112, sections 2.2, 3.2, 5.2, 6.1 and 6.3; RFC 9110, section 5.5.
    """
    if len(head) > MAX_HEAD_BYTES:
        raise _too_long()
    # without the request line and the empty line
    num_headers = head.count(b"\n") - 2
    if num_headers > MAX_HEADERS:
        raise ApiError(
            431, f"the request has {num_headers} headers, allowed: {MAX_HEADERS}; send fewer"
        )
    line, _, version = head.partition(b"\n")[0].rstrip(b"\r").rpartition(b" HTTP/")
    if version not in (b"1.0", b"1.1"):
        raise _invalid("the request line ends with no HTTP/1.1 or HTTP/1.0")
    broken = _BROKEN.search(head)
    if broken is not None:
        raise _invalid(_BROKEN_RULES[str(broken.lastgroup)])
    framing = [(name.lower(), value) for name, value in _FRAMING.findall(head)]
    if len(framing) > 1:
        names = " and ".join(name.decode() for name, _ in framing[:2])
        raise _invalid(f"it has the headers {names}; send one of them, once")
    for name, value in framing:
        if name == b"content-length" and not value.strip().isdigit():
            raise _invalid("Content-Length is not one number")
        if name == b"transfer-encoding" and version == b"1.0":
            raise _invalid("Transfer-Encoding came with HTTP/1.0; send Content-Length")
    method, _, target = line.partition(b" ")
    _check_target(method, target)


def _check_target(method: bytes, target: bytes) -> None:
    """Refuse the target of a request if it is neither a path nor a URL, or is * without OPTIONS.

    Source: RFC 9112, section 3.2; RFC 9110, section 4.2.
    """
    if target == b"*" and method != b"OPTIONS":
        raise _invalid("the target * is only for OPTIONS; send a path")
    if target.startswith(b"/") or target == b"*":
        return
    if _IS_URL.match(target) is None:
        raise _invalid("the target does not begin with /; send a path such as /v1/models")
    if _URL.fullmatch(target) is None:
        raise _invalid("the target is no URL such as http://HOST:PORT/PATH; send a path")


def _with_path(request: h11.Request) -> h11.Request:
    """Return a request whose target is a path, as the routes expect it.

    A whole URL replaces the Host header by its own host.

    Source: RFC 9112, section 3.2.2.
    """
    url = _URL.fullmatch(request.target)
    if url is None:
        return request
    host, path = url[1], url[2] or b""
    if not path.startswith(b"/"):
        path = b"*" if request.method == b"OPTIONS" and not path else b"/" + path
    others = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        headers=[(b"host", host), *others],
        target=path,
        http_version=request.http_version,
    )


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"the request is no valid HTTP/1.1 ({reason})")


def _too_long() -> ApiError:
    return ApiError(
        431,
        f"the head of the request is longer than {MAX_HEAD_BYTES} bytes; send fewer and shorter "
        "headers, and long values in the body",
    )
