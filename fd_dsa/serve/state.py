"""What all requests of one server share."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from fd_dsa.serve.errors import ApiError

if TYPE_CHECKING:
    from fd_dsa.engine.async_engine import AsyncEngine

_ALIAS = "default"
_POLL_S = 0.02


class ServerState:
    """The engine, the names it is served under, and the requests in flight.

    Args:
        engine: the engine that generates; started and stopped by the application's lifespan.
        served_model_names: at least one; responses carry the name that the request used.
        info: what the server tells of itself; called once, when it is first needed.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        served_model_names: Sequence[str],
        info: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.engine = engine
        self.served_model_names = tuple(served_model_names)
        self.created = int(time.time())
        # finding the commit starts processes
        self.info = functools.cache(info)
        self.draining = False
        self.active: set[str] = set()

    def unavailable(self) -> ApiError | None:
        """Why no new request is taken: a 503, or None when the server can serve."""
        if self.draining:
            return ApiError(
                503, "the server is shutting down; send the request to another one or retry later"
            )
        if self.engine.errored is not None:
            return ApiError(503, "the engine has failed; restart the server (its log says why)")
        if not self.engine.is_running:
            return ApiError(503, "the engine is not running yet; retry in a moment")
        return None

    def check_available(self) -> None:
        """Raise the 503 of `unavailable`, if there is one."""
        error = self.unavailable()
        if error is not None:
            raise error

    def resolve_model(self, name: str | None) -> str:
        """The served name for the `model` of a request; None and "default" are the first one.

        Raises:
            ApiError: 404, no model of that name is served.
        """
        if name in self.served_model_names:
            return str(name)
        if name is None or name == _ALIAS:
            return self.served_model_names[0]
        served = ", ".join(self.served_model_names)
        raise ApiError(
            404,
            f"model: got {name!r}; this server has {served}",
            param="model",
            code="model_not_found",
        )

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, let running ones end for `timeout_s`, then abort the rest.

        An aborted request still answers, with what it has and finish_reason "abort".
        """
        self.draining = True
        deadline = time.monotonic() + timeout_s
        while self.active and time.monotonic() < deadline and self.engine.errored is None:
            await asyncio.sleep(_POLL_S)
        for request_id in tuple(self.active):
            self.engine.abort(request_id)


def _server_state(request: Request) -> ServerState:
    """The state of the application that handles this request."""
    state: ServerState = request.app.state.server
    return state


State = Annotated[ServerState, Depends(_server_state)]
"""Parameter type of a route: the state of its application."""
