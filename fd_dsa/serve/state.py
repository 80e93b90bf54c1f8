"""The state that all requests of a server share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request
from starlette.types import Scope

from fd_dsa.serve.errors import ApiError, FieldError, show
from fd_dsa.serve.flags import ServerOptions
from fd_dsa.serve.workers import Workers
from fd_dsa.startup.progress import StartupProgress

if TYPE_CHECKING:
    from fd_dsa.engine.async_engine import AsyncEngine

UNRESPONSIVE_S = 20.0
"""Time without an answer of the engine's process after which probes fail, seconds."""
_ALIAS = "default"
_POLL_S = 0.02

Info = Callable[[], Awaitable[Mapping[str, Any]]]
"""Computes the facts of /server_info."""


class ServerState:
    """The engine, its served names, the server's options, and the requests in progress.

    Args:
        served_model_names: at least one name. A response has the name of its request.
        info: computes the facts of /server_info. It is called once, at the first request of them.

    Attributes:
        num_admitted: running and waiting outputs of all requests.
        num_accepted: requests in progress, from the end of the body to the end of the answer.
        draining: True refuses new requests.
        is_closed: True also refuses accepted requests.
        num_body_bytes: bytes of the bodies in memory, without the first 64 KiB of each.
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
        # tasks of bounded length: bodies and answers. A long body holds the GIL for tens of
        # milliseconds, and the event loop would wait for several of them in turn.
        self.workers = Workers("front", 1)
        # templates, tokenizers and grammars, which may take long
        self.prompt_workers = Workers("prompts", 4)
        self.draining = self.is_closed = False
        self.num_accepted = 0
        self.active: set[str] = set()

    @property
    def engine(self) -> AsyncEngine:
        """Return the engine.

        Raises:
            ApiError: 503 while the engine is loading.
        """
        if self.loaded_engine is None:
            raise self._loading()
        return self.loaded_engine

    async def info(self) -> Mapping[str, Any]:
        """Return the facts of /server_info."""
        if self._info is None:
            self._info = await self._find_info() if self._find_info is not None else {}
        return self._info

    def unavailable(self, *, is_accepted: bool = False) -> ApiError | None:
        """Return the 503 that the server answers now, or None if it can serve.

        Args:
            is_accepted: True for a request from before the drain, which waits for it.
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
        """Raise the 503 of `unavailable` if there is one."""
        error = self.unavailable(is_accepted=is_accepted)
        if error is not None:
            try:
                raise error
            finally:
                # its traceback has this frame
                del error

    def resolve_model(self, name: str | None) -> str:
        """Return the served name for the `model` of a request.

        None, an empty name and "default" stand for the first name.

        Raises:
            ApiError: 404, no model of that name is served.
        """
        if name in self.served_model_names:
            return str(name)
        if not name or name == _ALIAS:
            return self.served_model_names[0]
        served = ", ".join(self.served_model_names)
        raise ApiError(
            404,
            f"model: got {show(name)}; this server has {served}",
            param="model",
            code="model_not_found",
        )

    def hold(self, request: Scope, num_outputs: int, param: str = "prompt") -> None:
        """Count running and waiting outputs of a request, at least as many as before.

        Args:
            request: state of its ASGI scope, which keeps the count.
            param: field of the request that sets the count.

        Raises:
            ApiError: 400 if the limit is too low for the request; 429 if the server is too busy for
                it.
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

    def release(self, request: Scope) -> None:
        """Remove the outputs of a request from the count."""
        self.num_admitted -= request.get("num_outputs", 0)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, and wait for accepted ones before aborting them.

        An aborted request is still answered, with its text so far and finish_reason "abort".

        Args:
            timeout_s: time to wait for the accepted requests, seconds.
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
"""Type of a route's parameter for the state of its application."""
