"""Pages for people: the chat page at / and the API's documentation at /docs.

FastAPI's own documentation page loads Swagger UI from another server. A server without internet
access cannot reach it, and it would learn who reads the page. So the page is a file of the package.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC_PREFIX = "/static/"
"""Prefix of scripts and styles.

They are public, because the pages themselves ask for the key.
"""
PAGE_PATHS = frozenset({"/", "/docs"})
"""Paths of the pages, which are public too."""

_FOLDER = Path(__file__).parent / "static"
_HEADERS = {
    # the browser revalidates its copy
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
    """The folder `static`, served with the pages' security headers."""

    def __init__(self) -> None:
        super().__init__(directory=_FOLDER)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


@chat_router.get("/")
async def chat_page() -> FileResponse:
    """Return the chat page."""
    return FileResponse(_FOLDER / "index.html", headers=_HEADERS)


@api_router.get("/docs")
async def api_page() -> FileResponse:
    """Return the API's documentation."""
    return FileResponse(_FOLDER / "docs.html", headers=_HEADERS)
