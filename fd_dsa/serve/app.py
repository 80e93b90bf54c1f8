"""The FastAPI application: routes, request ids, lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import string
import uuid
from collections.abc import AsyncIterator
from typing import Literal

from fastapi import APIRouter, FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# pydantic reads only this TypedDict before Python 3.12
from typing_extensions import TypedDict

from fd_dsa import __version__
from fd_dsa.serve import (
    chat,
    completions,
    messages,
    metrics,
    pages,
    responses,
    status,
    tokenization,
)
from fd_dsa.serve.errors import (
    ApiError,
    ErrorResponse,
    error_responses,
    install_error_handlers,
    internal_error,
    is_anthropic,
)
from fd_dsa.serve.guard import GuardMiddleware
from fd_dsa.serve.openapi import Application
from fd_dsa.serve.state import ServerState, State
from fd_dsa.serve.workers import ClientGone

_MAX_REQUEST_ID_CHARS = 128
_REQUEST_ID_CHARS = frozenset(string.ascii_letters + string.digits + "-_.:/+=")

logger = logging.getLogger("fd_dsa.serve")
router = APIRouter()


class ModelCard(TypedDict):
    """A served model, its maximum length in tokens and its sampling defaults."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    sampling_defaults: dict[str, float | int]


class ModelList(TypedDict):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]


def create_app(state: ServerState) -> FastAPI:
    """Create the application that serves the engine of `state`.

    The engine is stopped when the application ends.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            state.workers.close()
            state.prompt_workers.close()
            if state.loaded_engine is not None:
                await asyncio.to_thread(state.loaded_engine.stop)

    app = Application(
        title="fd_dsa",
        summary="DeepSeek Sparse Attention on PaddlePaddle, over the OpenAI API",
        version=__version__,
        lifespan=lifespan,
        responses=error_responses(ErrorResponse),
        # FastAPI's pages load scripts from other servers
        docs_url=None,
        redoc_url=None,
        # a redirect would repeat the Host header, which is the client's
        redirect_slashes=False,
    )
    app.state.server = state
    app.add_middleware(GuardMiddleware, state=state)
    # Starlette runs the middleware that was added last first
    app.add_middleware(RequestIdMiddleware)
    install_error_handlers(app)
    app.include_router(router)
    for part in (chat, completions, responses, messages, tokenization, status, metrics):
        app.include_router(part.router)
    app.include_router(pages.api_router)
    app.mount(pages.STATIC_PREFIX, pages.PageFiles())
    if not state.options.disable_ui:
        app.include_router(pages.chat_router)
    return app


@router.get("/v1/models", summary="The served models")
async def list_models(state: State) -> ModelList:
    """List the served names with the maximum length in tokens and the sampling defaults."""
    return {"object": "list", "data": [_model(state, n) for n in state.served_model_names]}


@router.get("/v1/models/{name:path}", summary="One served model")
async def get_model(name: str, state: State) -> ModelCard:
    """Return the model with this name. A 404 lists the served names."""
    if not name:
        # the list has no path with a slash at its end, as no other path has
        raise HTTPException(404)
    return _model(state, state.resolve_model(name))


def _model(state: ServerState, name: str) -> ModelCard:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "fd_dsa",
        "max_model_len": state.engine.max_model_len,
        "sampling_defaults": state.engine.sampling_defaults,
    }


class RequestIdMiddleware:
    """Adds an `X-Request-Id` to every response: the client's own, or a random one.

    Clients of the Anthropic API read the id as `request-id`.

    `HEAD` is routed as `GET` on every path. The connection drops the body and keeps its length. An
    unhandled exception is logged with the id and answered with a 500. A request that the shutdown
    cancels is answered with a 503.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # keep the client's id if it is short and plain
        sent = Headers(scope=scope).get("x-request-id", "")
        is_plain = 0 < len(sent) <= _MAX_REQUEST_ID_CHARS and _REQUEST_ID_CHARS.issuperset(sent)
        request_id = sent if is_plain else uuid.uuid4().hex
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        state = {**scope.get("state", {}), "request_id": request_id}
        scope = {**scope, "method": method, "state": state}
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if is_anthropic(scope["path"]):
                    headers["request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientGone:
            logger.info("request %s: the client went away", request_id)
            await Response(status_code=499)(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # only uvicorn cancels a request, when the time for the last requests is over
            logger.warning("request %s: ended by the shutdown", request_id)
            if not started:
                error = ApiError(503, "the server has shut down before the request began")
                await error.response(scope["path"])(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if not started:
                error = internal_error(request_id)
                await error.response(scope["path"])(scope, receive, send_with_id)
