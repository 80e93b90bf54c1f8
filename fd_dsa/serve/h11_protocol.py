"""What uvicorn does for one connection, and its limits.

Bytes that are no HTTP are answered with an error object, as every other failure. A client loses its
connection when it stops reading, so that nobody holds buffers and places indefinitely; when it
does not finish what it sends, so that nobody holds sockets; and when it sends nothing while others
need the place.
"""

from __future__ import annotations

import asyncio
import logging
import select
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.listener import Listener
from fd_dsa.serve.status import PROBE_PATHS
from fd_dsa.serve.strict_h11 import MAX_HEAD_BYTES, StrictConnection

STALLED_S = 60.0
"""Seconds for which a client may read nothing while an answer waits for it."""

HEAD_TIMEOUT_S = 60.0
"""Seconds that a client has for the head of a request, on a new connection from its beginning."""

# for which a refused client may read its answer: a close while it still sends would take it away
_LINGER_S = 1.0
_CAN_ANSWER = (h11.IDLE, h11.SEND_RESPONSE)
_PROBES = frozenset(path.encode() for path in PROBE_PATHS)

logger = logging.getLogger("fd_dsa.serve")


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
    """uvicorn's protocol of one connection.

    Args:
        config: of uvicorn.
        server_state: of uvicorn.
        app_state: of the application's lifespan.
        listener: counts this connection.

    Attributes:
        stalled_s: seconds until a connection is given up whose client does not read.
        head_timeout_s: seconds until one is given up that has not brought a whole head.
    """

    stalled_s = STALLED_S
    head_timeout_s = HEAD_TIMEOUT_S

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        listener: Listener,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.conn = StrictConnection(self._admit, self._refuse)
        self._listener = listener
        self._give_up: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_refused = False

    @property
    def is_flushed(self) -> bool:
        """Whether every byte of the last answer has been handed to the kernel."""
        return not self.transport.get_write_buffer_size()

    @property
    def has_unread(self) -> bool:
        """Whether the kernel holds bytes of the client that are read in the next turn."""
        if self._is_refused or self.transport.is_closing():
            return False
        descriptor = self.transport.get_extra_info("socket").fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def drop(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

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
        is_body = self.conn.their_state is h11.SEND_BODY
        if is_body and self._is_answered:
            # of the rest of a body that nobody reads
            return
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head_timer is None:
            self._expect_head()

    def on_response_complete(self) -> None:
        """The answer has been handed over, perhaps before the whole request had come."""
        self._listener.waits(self)
        if self.conn.their_state is h11.SEND_BODY:
            self._expect_head()
        super().on_response_complete()
        # what was in memory may have been the beginning of a request
        self.flow.resume_reading()

    def _has_next_request(self) -> bool:
        """Whether a whole request is being answered, and enough has come after it."""
        is_whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return is_whole and len(self.conn.trailing_data[0]) > MAX_HEAD_BYTES

    @property
    def _is_answered(self) -> bool:
        """Whether the last request has its whole answer."""
        return self.cycle is not None and self.cycle.response_complete

    def _admit(self, request: h11.Request) -> None:
        """Count a request; where all places are taken only a probe is served."""
        is_probe = request.target.partition(b"?")[0] in _PROBES
        if self._listener.is_full and not is_probe:
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
        answer = error.response()
        headers = [
            *answer.raw_headers,
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        reason = HTTPStatus(error.status).phrase.encode()
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _expect_head(self) -> None:
        """Give the client its time for the head of a request, or for the rest of a refused one."""
        self._forget_head()
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
        """The client has read."""
        super().resume_writing()
        self._keep()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._keep()
        self._forget_head()
        self._listener.left(self)
        super().connection_lost(exc)

    def _keep(self) -> None:
        """Forget about giving up."""
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
