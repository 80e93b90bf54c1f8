"""What all requests of one server share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from fd_dsa.serve.errors import ApiError, FieldError, show
from fd_dsa.serve.flags import ServerOptions
from fd_dsa.serve.workers import Workers
from fd_dsa.startup.progress import StartupProgress

if TYPE_CHECKING:
    from fd_dsa.engine.async_engine import AsyncEngine

UNRESPONSIVE_S = 20.0
"""Silence of the engine's process after which probes fail, seconds."""
_ALIAS = "default"
_POLL_S = 0.02

Info = Callable[[], Awaitable[Mapping[str, Any]]]
"""Finds out what /server_info shows."""


class ServerState:
    """The engine, the names it is served under, what is allowed, and the requests in flight.

    Args:
        served_model_names: at least one; responses carry the name that the request used.
        info: finds out what /server_info shows; called once, when it is first needed.

    Attributes:
        num_admitted: running and waiting outputs of all requests.
        num_accepted: requests that compute, from the end of a body to the end of the answer.
        draining: no new request is accepted.
        is_closed: the accepted ones are not waited for any more either.
        num_body_bytes: of the bodies in memory, without the first 64 KiB of each.
    """

    def __init__(
        self,
        served_model_names: Sequence[str],
        info: Info | None = None,
        options: ServerOptions | None = None,
    ) -> None:
        self.loaded_engine: AsyncEngine | None = None
        self.served_model_names = tuple(served_model_names)
        self.created = int(time.time())
        self._find_info = info
        self._info: Mapping[str, Any] | None = None
        self.options = options or ServerOptions()
        self.startup = StartupProgress()
        self.num_admitted = self.num_body_bytes = 0
        # work of bounded length: bodies and answers
        self.workers = Workers("front", 2)
        # templates, tokenizers and grammars, which may take long
        self.prompt_workers = Workers("prompts", 4)
        self.draining = self.is_closed = False
        self.num_accepted = 0
        self.active: set[str] = set()

    @property
    def engine(self) -> AsyncEngine:
        """The engine; ApiError 503 while it is loading."""
        if self.loaded_engine is None:
            raise self._loading()
        return self.loaded_engine

    async def info(self) -> Mapping[str, Any]:
        """What /server_info shows."""
        if self._info is None:
            self._info = await self._find_info() if self._find_info is not None else {}
        return self._info

    def unavailable(self, *, is_accepted: bool = False) -> ApiError | None:
        """Why no request is served: a 503, or None when the server can serve.

        Args:
            is_accepted: the request came before the drain, which waits for it.
        """
        engine = self.loaded_engine
        if self.is_closed or (self.draining and not is_accepted):
            return _later(
                "the server is shutting down; send the request to another one or retry later",
                "shutting_down",
            )
        if engine is None:
            return self._loading()
        if engine.errored is not None:
            message = "the engine has failed; restart the server (its log says why)"
            return ApiError(503, message, code="engine_failed")
        if engine.silent_s > UNRESPONSIVE_S:
            return _later(
                f"the engine's process has not answered for {engine.silent_s:.0f} s; it may be "
                "stopped or hang; restart the server if it does not come back",
                "engine_unresponsive",
            )
        if not engine.is_running:
            return _later("the engine is not running yet; retry in a moment")
        return None

    def _loading(self) -> ApiError:
        return _later(f"the model is loading: {self.startup.describe()}; retry later")

    def check_available(self, *, is_accepted: bool = False) -> None:
        """Raise the 503 of `unavailable`, if there is one."""
        error = self.unavailable(is_accepted=is_accepted)
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
            f"model: got {show(name)}; this server has {served}",
            param="model",
            code="model_not_found",
        )

    def hold(self, request: dict[str, Any], num_outputs: int, param: str = "prompt") -> None:
        """Count so many running and waiting outputs of a request, not fewer than before.

        Args:
            request: the state of its ASGI scope, which keeps their number.
            param: the field of the request that says how many.

        Raises:
            ApiError: 400, no server with this limit could take the request; 429, not now.
        """
        limit, held = self.options.max_concurrency, request.get("num_outputs", 0)
        if num_outputs > limit:
            raise FieldError(
                f"{param}: the request asks for {num_outputs} outputs, --max-concurrency is "
                f"{limit}; send fewer at a time"
            )
        added = max(num_outputs - held, 0)
        if self.num_admitted + added > limit:
            raise ApiError(
                429,
                f"the server has {self.num_admitted} outputs running and waiting, "
                f"--max-concurrency is {limit}; send the request again later",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
        self.num_admitted += added
        request["num_outputs"] = held + added

    def release(self, request: dict[str, Any]) -> None:
        """Count the outputs of a request no more."""
        self.num_admitted -= request.get("num_outputs", 0)

    async def drain(self, timeout_s: float) -> None:
        """Accept no new requests, wait for the accepted ones for `timeout_s`, then abort the rest.

        An aborted request still answers, with what it has and finish_reason "abort".
        """
        self.draining = True
        deadline = time.monotonic() + timeout_s
        engine = self.loaded_engine
        while self.num_accepted and time.monotonic() < deadline:
            if engine is not None and engine.errored is not None:
                break
            await asyncio.sleep(_POLL_S)
        self.is_closed = True
        for request_id in tuple(self.active):
            self.engine.end(request_id)


def _later(message: str, code: str = "loading") -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": "5"})


def _server_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


State = Annotated[ServerState, Depends(_server_state)]
"""Parameter type of a route: the state of its application."""
