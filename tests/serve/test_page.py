"""The pages for people: /docs with its document, and the files of the page at /."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

import fd_dsa.serve
from fd_dsa.serve.pages import render
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine

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


STATIC = Path(fd_dsa.serve.__file__).parent / "static"
PATHS = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
# another host, a way from a text to HTML or code, or a style that the policy refuses
FORBIDDEN = re.compile(
    r"https?:|[\"'(=]//|@import|url\(|innerHTML|outerHTML|insertAdjacent|createContextualFragment"
    r"|document\.write|srcdoc|\beval\b|new Function|import\(|\bon[a-z]+=|style=",
)


def test_one_file_of_each_kind_and_small() -> None:
    files = sorted(file.name for file in STATIC.iterdir())
    assert files == ["api.css", "api.html", "index.html", "page.css", "page.js"]
    assert sum((STATIC / name).stat().st_size for name in files) <= 60_000


@pytest.mark.parametrize(("path", "kind"), PATHS.items())
def test_files_are_served_under_a_strict_policy(live: Live, path: str, kind: str) -> None:
    reply = live.http.get(path)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == f"{kind}; charset=utf-8"
    assert reply.content == (STATIC / (path.strip("/") or "index.html")).read_bytes()
    directives = dict(d.split() for d in reply.headers["content-security-policy"].split(";"))
    assert directives == POLICY
    assert reply.headers["x-content-type-options"] == "nosniff"
    head = live.http.head(path)
    assert head.status_code == 200
    assert head.content == b""


@pytest.mark.parametrize("name", ["index.html", "page.css", "page.js"])
def test_no_file_reaches_out_or_makes_html_of_texts(name: str) -> None:
    found = FORBIDDEN.findall((STATIC / name).read_text("utf-8"))
    assert found == []


def test_the_page_loads_its_own_files_alone() -> None:
    text = (STATIC / "index.html").read_text("utf-8")
    loaded = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert sorted(loaded) == ["data:,", "page.css", "page.js"]


def test_the_page_is_no_part_of_the_api(live: Live) -> None:
    paths = live.http.get("/openapi.json").json()["paths"]
    assert not paths.keys() & PATHS.keys()


def test_the_page_asks_for_the_key_itself() -> None:
    with running(FakeEngine(), api_key=("secret",)) as live:
        assert {live.http.get(path).status_code for path in PATHS} == {200}
        assert live.http.get("/v1/models").status_code == 401


def test_there_may_be_no_page() -> None:
    with running(FakeEngine(), disable_ui=True) as live:
        for path in PATHS:
            reply = live.http.get(path)
            assert reply.status_code == 404
            assert "does not exist" in reply.json()["error"]["message"]
