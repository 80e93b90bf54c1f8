"""Probes, version and /server_info; those of `guard.OPEN_PATHS` need no key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from fd_dsa import __version__
from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.json_response import JsonResponse
from fd_dsa.serve.state import UNRESPONSIVE_S, State

PROBE_PATHS = frozenset({"/health", "/livez", "/readyz", "/startupz"})
"""Paths that an orchestrator asks; they are answered when nothing else is."""

router = APIRouter()


@router.get("/readyz", summary="The same as /health, by Kubernetes' name")
@router.get("/health", summary="200 when requests are served, else 503")
async def health(state: State) -> Response:
    """200 only when a request sent now would be served; the 503 says why not."""
    return _ok_unless(state.unavailable())


@router.get("/startupz", summary="503 with phase and seconds while the model loads, then 200")
async def startupz(state: State) -> Response:
    """200 from the end of the start on, whatever comes later."""
    return _ok_unless(state.unavailable() if state.loaded_engine is None else None)


@router.get("/livez", summary="503 when only a restart helps, else 200")
async def livez(state: State) -> Response:
    """200 while loading, serving and draining; 503 if the engine has failed or is silent."""
    engine = state.loaded_engine
    is_dead = engine is not None and (
        engine.errored is not None or engine.silent_s > UNRESPONSIVE_S
    )
    return _ok_unless(state.unavailable() if is_dead else None)


@router.get("/version", summary="Version of fd_dsa")
async def version() -> dict[str, str]:
    """The version alone; /server_info says more."""
    return {"version": __version__}


@router.get("/server_info", summary="Versions, device, types and limits of this server")
async def server_info(state: State) -> dict[str, Any]:
    """What decides the answers of this server; null is what cannot be found out."""
    # loading: there is little to show yet
    _ = state.engine
    return await state.info()


def _ok_unless(error: ApiError | None) -> Response:
    return JsonResponse({"status": "ok"}) if error is None else error.response()
