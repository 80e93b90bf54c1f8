"""Probes, version and /server_info; those of `guard.OPEN_PATHS` need no key."""

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

PROBE_PATHS = frozenset({"/health", "/livez", "/readyz", "/startupz"})
"""Paths that an orchestrator asks; they are answered when nothing else is."""

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
    """200 only when a request sent now would be served; the 503 says why not."""
    return _ok_unless(state.unavailable())


@router.get(
    "/startupz",
    summary="503 with phase and seconds while the model loads, then 200",
    response_model=Health,
)
async def startupz(state: State) -> Response:
    """200 from the end of the start on, whatever comes later."""
    return _ok_unless(state.unavailable() if state.loaded_engine is None else None)


@router.get("/livez", summary="503 when only a restart helps, else 200", response_model=Health)
async def livez(state: State) -> Response:
    """200 while loading, serving and draining; 503 if the engine has failed or is silent."""
    engine = state.loaded_engine
    is_dead = engine is not None and (
        engine.errored is not None or engine.silent_s > UNRESPONSIVE_S
    )
    return _ok_unless(state.unavailable() if is_dead else None)


@router.get("/version", summary="Version of fd_dsa")
async def version() -> Version:
    """The version alone; /server_info says more."""
    return {"version": __version__}


@router.get(
    "/server_info",
    summary="Versions, device, types and limits of this server",
    response_model=ServerInfo,
)
async def server_info(state: State) -> Response:
    """What decides the answers of this server; null is what cannot be found out."""
    # loading: there is little to show yet
    _ = state.engine
    return JsonResponse(await state.info())


def _ok_unless(error: ApiError | None) -> Response:
    health: Health = {"status": "ok"}
    return JsonResponse(health) if error is None else error.response()
