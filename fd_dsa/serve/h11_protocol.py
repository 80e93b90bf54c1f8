"""A connection of uvicorn and h11 that answers faults, and whose clients have limits.

Bytes that are not HTTP are answered with an error object, like every other failure. A client loses
its connection in three cases. It stops reading, and would hold buffers and places indefinitely. It
does not finish a request, and would hold a socket. It sends no request while others need the place.
"""

from __future__ import annotations

import asyncio
import logging
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
from fd_dsa.serve.h11_connection import MAX_HEAD_BYTES, StrictConnection
from fd_dsa.serve.listener import Listener

STALLED_S = 60.0
"""Time for which a client may read no bytes while an answer waits for it, seconds."""

HEAD_TIMEOUT_S = 60.0
"""Time that a client has for the head of a request, from the start of a new connection, seconds."""

# time between two checks of a client that has ended its sending: it may have left
_RESET_CHECK_S = 0.05
# time in which a refused client may read its answer, which a close while it still sends would
# discard
_LINGER_S = 1.0
_CAN_ANSWER = (h11.IDLE, h11.SEND_RESPONSE)

logger = logging.getLogger("fd_dsa.serve")


class _BoundedFlow(FlowControl):
    """uvicorn's flow control, with limited reading ahead of a request in progress."""

    def __init__(self, transport: asyncio.Transport, has_enough: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._has_enough = has_enough

    def drop_callbacks(self) -> None:
        """Forget the callback, because no more data comes."""
        self._has_enough = lambda: False

    def resume_reading(self) -> None:
        """Continue reading unless the next requests are in memory already."""
        if not self._has_enough():
            super().resume_reading()


class StrictH11Protocol(H11Protocol):
    """uvicorn's protocol of one connection."""

    conn: StrictConnection
    flow: _BoundedFlow
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
        self._stall_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._reset_timer: asyncio.TimerHandle | None = None
        self._is_refused = self._is_head_request = self._is_ended = False
        # path of the request with the latest head, empty before a head
        self._path = ""

    @property
    def has_unread(self) -> bool:
        """True if the kernel holds bytes of the client that the next turn of the loop reads."""
        if self._is_refused or self.transport.is_closing():
            return False
        descriptor = self.transport.get_extra_info("socket").fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register a new connection and expect its first request."""
        super().connection_made(transport)
        self.flow = _BoundedFlow(transport, self._has_next_request)
        self._listener.add(self)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Read bytes of the client. An unfinished head does not restart its timer."""
        if self._is_refused:
            return
        super().data_received(data)
        is_answered = self.cycle is not None and self.cycle.response_complete
        if is_answered and self.conn.their_state is h11.SEND_BODY:
            # the rest of a body that has no reader
            return
        if self.conn.their_state is not h11.IDLE:
            self._cancel_head_timer()
        elif self._head_timer is None:
            self._expect_head()

    def on_response_complete(self) -> None:
        """Wait for the next request after an answer, or for the rest of this request."""
        self._listener.count_waiting(self)
        self._is_head_request = False
        if self.conn.their_state is h11.SEND_BODY:
            self._expect_head()
        super().on_response_complete()
        # the bytes in memory may be the beginning of a request
        self.flow.resume_reading()
        if self._is_ended and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer a client that has ended its sending after a complete request.

        A client that has left looks the same until it gets bytes, which its system then refuses. So
        the client gets an interim response, which HTTP/1.0 does not have. In the middle of a
        response only the application can send bytes, so the application receives an empty message
        after the body.

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
            self._check_for_reset()
        return True

    def _check_for_reset(self) -> None:
        """Drop the connection if the client's system has refused bytes, else check again later."""
        poll = select.poll()
        # poll reports errors always
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        if poll.poll(0):
            self.transport.abort()
        else:
            self._reset_timer = self.loop.call_later(_RESET_CHECK_S, self._check_for_reset)

    def _has_next_request(self) -> bool:
        """Return True if a complete request is being answered and enough bytes follow it."""
        is_whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return is_whole and len(self.conn.trailing_data[0]) > MAX_HEAD_BYTES

    def _admit(self, request: h11.Request) -> None:
        """Count a request. With all places taken, only probes are served."""
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
        self._listener.count_working(self)

    def _refuse(self, error: ApiError) -> None:
        """Answer bytes that never became a request, and close the connection."""
        request_id = uuid.uuid4().hex
        logger.warning("request %s refused with %d: %s", request_id, error.status, error)
        self._is_refused = True
        self._cancel_head_timer()
        self._listener.count_waiting(self)
        if self.cycle is not None:
            # the rest of its body has no reader
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
        """Start the timer of the head of a request, or of the rest of a refused request."""
        self._cancel_head_timer()
        self._path = ""
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def _cancel_head_timer(self) -> None:
        """Stop the timer of a head."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        """Close the connection, with an answer if a request has begun."""
        if not self.conn.trailing_data[0]:
            self.transport.close()
            return
        late = f"the head of the request did not come within {self.head_timeout_s:g} s"
        self._refuse(ApiError(408, f"{late}; send it at once"))

    def pause_writing(self) -> None:
        """Stop writing while the buffers are full, and abort after `stalled_s`."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.stalled_s, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stall_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_stall_timer()
        self._cancel_head_timer()
        if self._reset_timer is not None:
            self._reset_timer.cancel()
        self._listener.remove(self)
        super().connection_lost(exc)
        # uvicorn leaves the timer of a connection that was reset
        self._unset_keepalive_if_required()
        # the parts refer back to this connection; without these references its memory is free at
        # once, and not only after a full garbage collection
        self.conn.drop_callbacks()
        self.flow.drop_callbacks()
        if self.cycle is not None:
            self.cycle.on_response = lambda: None

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _abort(self) -> None:
        """Drop the connection, which ends its request like every disconnect."""
        logger.warning(
            "a client has not read for %g s while an answer waited; its connection is closed "
            "and its request aborted",
            self.stalled_s,
        )
        self.transport.abort()
