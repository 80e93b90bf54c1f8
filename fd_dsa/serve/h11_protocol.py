"""What uvicorn does for one connection, and three things more.

Bytes that are no HTTP are answered with an error object, as every other failure; a client that
stops reading loses its connection, so that nobody holds buffers and places for ever; and so does
one that does not come to the end of a request's head, so that nobody holds sockets.
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fd_dsa.serve.errors import ApiError

STALLED_S = 60.0
"""Seconds for which a client may read nothing while an answer waits for it."""

HEAD_TIMEOUT_S = 60.0
"""Seconds that a client has for the head of a request, on a new connection from its beginning."""

_CAN_ANSWER = (h11.IDLE, h11.SEND_RESPONSE)

logger = logging.getLogger("fd_dsa.serve")


class StrictH11Protocol(H11Protocol):
    """uvicorn's protocol of one connection.

    Attributes:
        stalled_s: seconds until a connection is given up whose client does not read.
        head_timeout_s: seconds until one is given up that has not brought a whole head.
    """

    stalled_s = STALLED_S
    head_timeout_s = HEAD_TIMEOUT_S
    _give_up: asyncio.TimerHandle | None = None
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come: its first request is due."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Bytes have come; those of a head that has no end yet do not put off its time."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head_timer is None:
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be parsed, and close the connection."""
        self._refuse(ApiError(400, f"the request is no valid HTTP/1.1 ({msg})"))

    def _refuse(self, error: ApiError) -> None:
        """Answer what never became a request, and close the connection."""
        if self.conn.our_state in _CAN_ANSWER:
            answer = error.response()
            headers = [*answer.raw_headers, (b"connection", b"close")]
            reason = HTTPStatus(error.status).phrase.encode()
            for event in (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _expect_head(self) -> None:
        """Give the client its time for the head of a request."""
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
        """The buffers are full: the answer waits, but not for ever."""
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
