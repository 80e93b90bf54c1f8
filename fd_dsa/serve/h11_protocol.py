"""What uvicorn and h11 do for one connection, its limits, and rules that h11 leaves to a server.

h11 is lenient where a proxy in front of it may read the same bytes otherwise, so that one request
could be smuggled after another: it takes Content-Length and Transfer-Encoding together, repeated
lengths, lines that end with LF alone, folded lines and control characters, and the same in
trailers.

Bytes that are no HTTP are answered with an error object, as every other failure. A client loses its
connection when it stops reading, so that nobody holds buffers and places indefinitely; when it
does not finish what it sends, so that nobody holds sockets; and when it sends nothing while others
need the place.
"""

from __future__ import annotations

import asyncio
import logging
import re
import select
import uuid
from collections.abc import Callable
from http import HTTPStatus

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.listener import Listener

MAX_HEAD_BYTES = 32 << 10
"""Longest head of a request: request line and headers."""
MAX_HEADERS = 100
"""Header lines of a request."""
# so many chunks of a body may be as small as they like, the others have this size on average: a
# chunk takes h11 as long as many bytes, and one read brings 256 KiB
_MANY_CHUNKS = 1024
_MIN_CHUNK_BYTES = 256

# where h11 takes a head to end
_HEAD_END = re.compile(rb"\n\r?\n")
_BROKEN = re.compile(
    rb"(?P<lf>(?<!\r)\n)|(?P<fold>\r\n[ \t])"
    rb"|(?P<control>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n))"
)
_BROKEN_RULES = {
    "lf": "a line of the head ends with LF alone; end lines with CR LF",
    "fold": "a header line is folded; send each header on one line",
    "control": "the head contains a control character; send none",
}
_FRAMING = re.compile(rb"\r\n(content-length|transfer-encoding):[ \t]*([^\r]*)", re.IGNORECASE)

STALLED_S = 60.0
"""Seconds for which a client may read nothing while an answer waits for it."""

HEAD_TIMEOUT_S = 60.0
"""Seconds that a client has for the head of a request, on a new connection from its beginning."""

# between two looks if a client that sends nothing more has left
_LOOK_S = 0.05
# for which a refused client may read its answer: a close while it still sends would take it away
_LINGER_S = 1.0
_CAN_ANSWER = (h11.IDLE, h11.SEND_RESPONSE)

logger = logging.getLogger("fd_dsa.serve")


class StrictConnection(h11.Connection):
    """A connection that refuses by a callback, and then wants no more data.

    Args:
        admit: called with each request when its head is right; may raise ApiError.
        refuse: called once with the reason when a request is refused; the connection has no further
            events.
    """

    def __init__(
        self, admit: Callable[[h11.Request], None], refuse: Callable[[ApiError], None]
    ) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._admit = admit
        self._refuse = refuse
        self._num_searched = self._num_chunks = self._num_chunk_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event of the client, never an exception."""
        try:
            if self.their_state is h11.IDLE:
                self._check_head()
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._admit(event)
            elif isinstance(event, h11.Data):
                self._check_chunk(event)
            elif isinstance(event, h11.EndOfMessage) and event.headers:
                # h11 is as lenient with their lines as with those of heads, and nobody reads them
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

    def _check_head(self) -> None:
        """Refuse a whole head that breaks a rule, before h11 takes time for each of its lines."""
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


def check_head(head: bytes) -> None:
    """Check what h11 will parse as the head of a request.

    Raises:
        ApiError: 400, or 431 where it is too long or has too many headers.

    Source: RFC 9112, sections 2.2, 5.2, 6.1 and 6.3; RFC 9110, section 5.5.
    """
    if len(head) > MAX_HEAD_BYTES:
        raise _too_long()
    # without the request line and the empty line
    num_headers = head.count(b"\n") - 2
    if num_headers > MAX_HEADERS:
        raise ApiError(
            431, f"the request has {num_headers} headers, allowed: {MAX_HEADERS}; send fewer"
        )
    version = head.partition(b"\n")[0].rstrip(b"\r").rpartition(b" HTTP/")[2]
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


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"the request is no valid HTTP/1.1 ({reason})")


def _too_long() -> ApiError:
    return ApiError(
        431,
        f"the head of the request is longer than {MAX_HEAD_BYTES} bytes; send fewer and shorter "
        "headers, and long values in the body",
    )


class _BoundedFlow(FlowControl):
    """uvicorn's flow control, which never reads ahead of a request that is still answered."""

    def __init__(self, transport: asyncio.Transport, has_enough: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._has_enough = has_enough

    def resume_reading(self) -> None:
        """Read on, unless the next requests wait in memory already."""
        if not self._has_enough():
            super().resume_reading()


class StrictH11Protocol(H11Protocol):
    """uvicorn's protocol of one connection."""

    stalled_s = STALLED_S
    head_timeout_s = HEAD_TIMEOUT_S

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        listener: Listener,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.conn = StrictConnection(self._admit, self._refuse)
        self._listener = listener
        self._give_up: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._is_refused = self._is_head_request = self._is_ended = False
        # of the request whose head came last; empty before a head
        self._path = ""

    @property
    def has_unread(self) -> bool:
        """Whether the kernel holds bytes of the client that are read in the next turn."""
        if self._is_refused or self.transport.is_closing():
            return False
        descriptor = self.transport.get_extra_info("socket").fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come: its first request is due."""
        super().connection_made(transport)
        self.flow = _BoundedFlow(transport, self._has_next_request)
        self._listener.joined(self)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Bytes have come; those of a head that has no end yet do not put off its time."""
        if self._is_refused:
            return
        super().data_received(data)
        is_answered = self.cycle is not None and self.cycle.response_complete
        if is_answered and self.conn.their_state is h11.SEND_BODY:
            # of the rest of a body that nobody reads
            return
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head_timer is None:
            self._expect_head()

    def on_response_complete(self) -> None:
        """The answer has been handed over, perhaps before the whole request had come."""
        self._listener.waits(self)
        self._is_head_request = False
        if self.conn.their_state is h11.SEND_BODY:
            self._expect_head()
        super().on_response_complete()
        # what was in memory may have been the beginning of a request
        self.flow.resume_reading()
        if self._is_ended and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer a client that has ended its sending after a whole request.

        A client that has left looks the same until it gets bytes, which its system then refuses.
        So it gets an interim response, which HTTP/1.0 does not have. In the middle of a response
        only the application can send bytes. It receives an empty message after the body.

        Returns:
            True to keep the connection open.
        """
        is_asked = self.cycle is not None and not self.cycle.response_complete
        is_whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        is_old = self.conn.their_http_version == b"1.0"
        if self._is_refused or not (is_asked and is_whole) or is_old:
            return False
        if not self._is_ended:
            self._is_ended = True
            if self.conn.our_state is h11.SEND_RESPONSE:
                interim = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
                self.transport.write(self.conn.send(interim))
            else:
                self.cycle.message_event.set()
            self._look_for_reset()
        return True

    def _look_for_reset(self) -> None:
        """Drop the connection of a client whose system refuses what it gets."""
        poll = select.poll()
        # errors are reported without being asked for
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        if poll.poll(0):
            self.transport.abort()
        else:
            self._look_timer = self.loop.call_later(_LOOK_S, self._look_for_reset)

    def _has_next_request(self) -> bool:
        """Whether a whole request is being answered, and enough has come after it."""
        is_whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return is_whole and len(self.conn.trailing_data[0]) > MAX_HEAD_BYTES

    def _admit(self, request: h11.Request) -> None:
        """Count a request; where all places are taken only a probe is served."""
        self._is_head_request = request.method == b"HEAD"
        self._path = request.target.partition(b"?")[0].decode("ascii", "replace")
        if self._listener.is_full and not self._listener.is_probe(request.target):
            raise ApiError(
                503,
                f"{self._listener.limit} connections have a request in progress, as many as "
                "--max-connections allows; send the request again later",
                code="too_many_connections",
                headers={"Retry-After": "1"},
            )
        self._listener.works(self)

    def _refuse(self, error: ApiError) -> None:
        """Answer what never became a request, and close the connection."""
        request_id = uuid.uuid4().hex
        logger.warning("request %s refused with %d: %s", request_id, error.status, error)
        self._is_refused = True
        self._forget_head()
        self._listener.waits(self)
        if self.cycle is not None:
            # nobody reads the rest of its body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in _CAN_ANSWER:
            self.transport.close()
            return
        answer = error.response(self._path)
        headers = [
            *answer.raw_headers,
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        reason = HTTPStatus(error.status).phrase.encode()
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=b"" if self._is_head_request else bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _expect_head(self) -> None:
        """Give the client its time for the head of a request, or for the rest of a refused one."""
        self._forget_head()
        self._path = ""
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def _forget_head(self) -> None:
        """The head is there, or nobody waits for it any more."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        """Close the connection, with an answer where a request had begun."""
        if not self.conn.trailing_data[0]:
            self.transport.close()
            return
        late = f"the head of the request did not come within {self.head_timeout_s:g} s"
        self._refuse(ApiError(408, f"{late}; send it at once"))

    def pause_writing(self) -> None:
        """The buffers are full: the answer waits, for `stalled_s` at most."""
        super().pause_writing()
        self._give_up = self.loop.call_later(self.stalled_s, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep()

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep()
        self._forget_head()
        if self._look_timer is not None:
            self._look_timer.cancel()
        self._listener.left(self)
        super().connection_lost(exc)

    def _keep(self) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None

    def _abort(self) -> None:
        """Drop the connection, which ends its request as every disconnect does."""
        logger.warning(
            "a client has read nothing for %g s while an answer waited; its connection is closed "
            "and its request aborted",
            self.stalled_s,
        )
        self.transport.abort()
