"""Pages for people: a page to talk to the model at /, and the OpenAPI document at /docs.

FastAPI's own page of the document loads Swagger's scripts from another server, which a server
without a way out cannot reach, and which would tell others who reads.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from jinja2 import Environment
from starlette.responses import HTMLResponse, Response

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
CHAT_PATHS = frozenset(_FILES)
"""Paths of the page at /. They hold no secret: the page asks for the key itself."""

_STATIC = files("fd_dsa.serve") / "static"
_STYLE = (_STATIC / "api.css").read_text("utf-8")


def _headers(sources: str) -> dict[str, str]:
    """Headers of a page that loads from these sources alone: no frame, form or inline script."""
    return {
        "Content-Security-Policy": f"default-src 'none'; {sources}; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


_CHAT_HEADERS = {
    "Cache-Control": "no-cache",
    **_headers("script-src 'self'; style-src 'self'; connect-src 'self'"),
}
# the only style sheet is part of the page
_STYLE_SHA256 = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_API_HEADERS = _headers(f"style-src 'sha256-{_STYLE_SHA256}'")

chat_router = APIRouter(include_in_schema=False)
api_router = APIRouter(include_in_schema=False)


def _add(path: str, name: str, media_type: str) -> None:
    """Give a file of the folder `static`, which is read once, at a path."""
    content = (_STATIC / name).read_bytes()

    @chat_router.api_route(path, methods=["GET", "HEAD"])
    async def give() -> Response:
        return Response(content, media_type=media_type, headers=_CHAT_HEADERS)


for _path, _file in _FILES.items():
    _add(_path, *_file)


@api_router.api_route("/docs", methods=["GET", "HEAD"])
def api_page(request: Request) -> HTMLResponse:
    """What the server answers to."""
    return HTMLResponse(render(request.app.openapi()), headers=_API_HEADERS)


def render(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as HTML; texts of it are texts."""
    schemas = {
        name: schema
        for name, schema in sorted(document["components"]["schemas"].items())
        if "properties" in schema
    }
    template = Environment(autoescape=True).from_string((_STATIC / "api.html").read_text("utf-8"))
    return template.render({**document, "schemas": schemas, "style": _STYLE})
