"""Pages for people: a page to talk to the model at /, and the API's document at /docs.

FastAPI's own page of the document loads Swagger UI from another server, which a server without
internet access cannot reach, and which would learn who reads. Here it is a file of the package.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC_PREFIX = "/static/"
"""Of the paths of scripts and styles. They hold no secret: the pages ask for the key themselves."""
PAGE_PATHS = frozenset({"/", "/docs"})
"""Paths of the pages, which hold none either."""

_FOLDER = Path(__file__).parent / "static"
_HEADERS = {
    # the browser asks whether its copy is still the same
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; font-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

chat_router = APIRouter(include_in_schema=False)
api_router = APIRouter(include_in_schema=False)


class PageFiles(StaticFiles):
    """The folder `static`, under the policy of the pages."""

    def __init__(self) -> None:
        super().__init__(directory=_FOLDER)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


@chat_router.get("/")
async def chat_page() -> FileResponse:
    """The page to talk to the model."""
    return FileResponse(_FOLDER / "index.html", headers=_HEADERS)


@api_router.get("/docs")
async def api_page() -> FileResponse:
    """What the server answers to."""
    return FileResponse(_FOLDER / "docs.html", headers=_HEADERS)
