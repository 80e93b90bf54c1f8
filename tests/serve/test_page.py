"""The files of the page at /: their sizes, headers, and what they may not hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fd_dsa.serve
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine

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
    assert files == ["index.html", "page.css", "page.js"]
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
