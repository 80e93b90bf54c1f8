"""Probes, version and /server_info.

The routes of `guard.OPEN_PATHS` need no key.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from starlette.responses import Response

# pydantic reads only this TypedDict before Python 3.12
from typing_extensions import TypedDict

from fd_dsa import __version__
from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.info import ServerInfo
from fd_dsa.serve.json_response import JsonResponse
from fd_dsa.serve.state import UNRESPONSIVE_S, State

router = APIRouter()


class Health(TypedDict):
    """State of a server that serves."""

    status: Literal["ok"]


class Version(TypedDict):
    """Version of fd_dsa."""

    version: str


@router.get("/readyz", summary="The same as /health, by Kubernetes' name", response_model=Health)
@router.get("/health", summary="200 when requests are served, else 503", response_model=Health)
async def health(state: State) -> Response:
    """Answer 200 only if a request sent now would be served, else a 503 with the reason."""
    return _ok_unless(state.unavailable())


@router.get(
    "/startupz",
    summary="503 with phase and seconds while the model loads, then 200",
    response_model=Health,
)
async def startupz(state: State) -> Response:
    """Answer 200 from the end of the start on, also after a later failure."""
    return _ok_unless(state.unavailable() if state.loaded_engine is None else None)


@router.get("/livez", summary="503 when only a restart helps, else 200", response_model=Health)
async def livez(state: State) -> Response:
    """Answer 200 unless the engine has failed or is silent, then 503."""
    engine = state.loaded_engine
    is_dead = engine is not None and (
        engine.errored is not None or engine.silent_s > UNRESPONSIVE_S
    )
    return _ok_unless(state.unavailable() if is_dead else None)


@router.get("/version", summary="Version of fd_dsa")
async def version() -> Version:
    """Answer with the version only. /server_info has further facts."""
    return {"version": __version__}


@router.get(
    "/server_info",
    summary="Versions, device, types and limits of this server",
    response_model=ServerInfo,
)
async def server_info(state: State) -> Response:
    """Answer with all facts that determine this server's answers. Unknown facts are null."""
    # the facts are known only after loading
    _ = state.engine
    return JsonResponse(await state.info())


def _ok_unless(error: ApiError | None) -> Response:
    health: Health = {"status": "ok"}
    return JsonResponse(health) if error is None else error.response()
