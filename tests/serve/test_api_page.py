"""/docs and /openapi.json: what the server answers to, for people and for programs."""

from __future__ import annotations

import base64
import hashlib
import re

from fd_dsa.serve.pages import render
from tests.serve.conftest import Live

ROUTES = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/health")


def test_the_page_has_every_route_and_field_of_the_document(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    assert set(ROUTES) <= document["paths"].keys()
    text = live.http.get("/docs").text
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert f"<h2>{method.upper()} {path}</h2>" in text
            assert operation["summary"] in text.replace("&#39;", "'")
    for name, schema in document["components"]["schemas"].items():
        assert f'<h2 id="{name}">' in text
        for field in schema["properties"]:
            assert f"<tr><td>{field}</td>" in text
    anchors = set(re.findall(r'href="#([^"]*)"', text))
    assert (
        {"CompletionRequest", "ErrorResponse"}
        <= anchors
        <= document["components"]["schemas"].keys()
    )


def test_the_page_loads_nothing_and_runs_nothing(live: Live) -> None:
    reply = live.http.get("/docs")
    assert re.findall(r'(?:src|href)="([^"#][^"]*)"', reply.text) == ["data:,", "openapi.json"]
    assert not re.search(r"<script|https?:|@import|url\(|\bon[a-z]+=", reply.text)
    policy = reply.headers["content-security-policy"]
    style = re.search(r"<style>(.*)</style>", reply.text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'; " in policy
    assert live.http.head("/docs").content == b""
    assert live.http.get("/redoc").status_code == 404
    assert live.http.get("/docs/oauth2-redirect").status_code == 404


def test_texts_of_a_document_are_texts() -> None:
    evil = "<script>alert(1)</script>"
    schema = {"description": evil, "properties": {evil: {"enum": [evil], "default": evil}}}
    text = render(
        {
            "info": {"title": evil, "version": evil},
            "paths": {evil: {"get": {"summary": evil}}},
            "components": {"schemas": {evil: schema}},
        }
    )
    assert "<script" not in text and "alert(1)" in text


def test_the_document_tells_the_errors_that_are_sent(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["responses"].keys() == {"200", "default"}
            content = operation["responses"]["default"]["content"]["application/json"]
            assert content["schema"]["$ref"].endswith("/ErrorResponse")
    error = document["components"]["schemas"]["ErrorObject"]
    assert error["properties"].keys() == {"message", "type", "param", "code"}
