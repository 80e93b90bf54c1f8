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

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
h2 { margin: 2rem 0 0; font-size: 1.1rem; overflow-wrap: anywhere; }
p { margin: 0.2rem 0; }
table { width: 100%; border-collapse: collapse; }
td, th { padding: 0.2rem 0.5rem; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #8885; }
td:nth-child(-n+3) { font-family: ui-monospace, monospace; font-size: 0.9em; }
"""
# null is what every field takes that may be left out
_TEMPLATE = """\
{% macro kind(schema) %}{% if schema["$ref"] %}{% set name = schema["$ref"].split("/")[-1] %}
<a href="#{{ name }}">{{ name }}</a>
{%- elif schema.anyOf %}{% for one in schema.anyOf if one.type != "null" %}
{%- if not loop.first %} or {% endif %}{{ kind(one) }}{% endfor %}
{%- elif schema.enum %}{{ schema.enum | map("tojson") | join(" or ") }}
{%- elif schema.type == "array" %}array of {{ kind(schema["items"] or {}) }}
{%- else %}{{ schema.type or "any" }}{% endif %}{% endmacro -%}
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ info.title }} {{ info.version }}: API</title>
<link rel="icon" href="data:,">
<style>{{ style | safe }}</style>
<h1>{{ info.title }} {{ info.version }}</h1>
<p>{{ info.summary }}. The same for programs: <a href="openapi.json">openapi.json</a>.
Where the server asks for a key, send the header <code>Authorization: Bearer KEY</code>. Every
failure is an <a href="#ErrorResponse">ErrorResponse</a>.</p>
{% for path, operations in paths.items() %}{% for method, operation in operations.items() %}
<h2>{{ method | upper }} {{ path }}</h2>
<p>{{ operation.summary }}</p>
{% if operation.description %}<p>{{ operation.description }}</p>{% endif %}
{% if operation.requestBody %}
{% set body = operation.requestBody.content["application/json"] %}
<p>Body: {{ kind(body.schema) }}</p>{% endif %}
{% endfor %}{% endfor %}
{% for name, schema in schemas.items() %}
<h2 id="{{ name }}">{{ name }}</h2>
{% if schema.description %}<p>{{ schema.description }}</p>{% endif %}
<table>
<tr><th>field</th><th>type</th><th>default</th><th>meaning</th></tr>
{% for field, value in schema.properties.items() %}
<tr><td>{{ field }}</td><td>{{ kind(value) }}</td>
<td>{% if field in schema.required %}required{% elif "default" in value %}
{{- value.default | tojson }}{% endif %}</td><td>{{ value.description }}</td></tr>
{% endfor %}
</table>
{% endfor %}
"""


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
    content = (files("fd_dsa.serve") / "static" / name).read_bytes()

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
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    return template.render({**document, "schemas": schemas, "style": _STYLE})
