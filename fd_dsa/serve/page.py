"""GET /: a page to talk to the model, its three files from the package."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PAGE_PATHS = frozenset(_FILES)
"""Paths of the page. They hold no secret: the page asks for the key itself."""

# the page's own files and this server, nothing else: no frame, no form, no inline script or style
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


def _route(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    """A handler that gives a file of the folder `static`, which is read once."""
    content = (files("fd_dsa.serve") / "static" / name).read_bytes()

    async def give() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return give


for _path, _file in _FILES.items():
    router.add_api_route(_path, _route(*_file), methods=["GET", "HEAD"])
