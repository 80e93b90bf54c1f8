"""The pages for people and their files, and the document of the API."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fd_dsa.serve
from tests.serve.conftest import Live, exchange, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.page.picture import RECORD, digests

ROOT = Path(__file__).resolve().parents[2]
ROUTES = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/health")


def test_the_document_tells_the_errors_that_are_sent(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        kind = "AnthropicErrorResponse" if path.startswith("/v1/messages") else "ErrorResponse"
        for operation in operations.values():
            assert operation["responses"].keys() == {"200", "default"}
            content = operation["responses"]["default"]["content"]["application/json"]
            assert content["schema"]["$ref"].endswith(f"/{kind}")
    error = document["components"]["schemas"]["ErrorObject"]
    assert error["properties"].keys() == {"message", "type", "param", "code"}


STATIC = Path(fd_dsa.serve.__file__).parent / "static"
OWN = sorted(path.name for path in STATIC.iterdir() if path.is_file())
PAGES = {"/": "index.html", "/docs": "docs.html"}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "font-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
# another host, a way from a text to HTML or code, or a style that the policy refuses
FORBIDDEN = re.compile(
    r"[\"'(=]//|@import|\burl\(|innerHTML|outerHTML|insertAdjacent|createContextualFragment"
    r"|document\.write|srcdoc|\beval\b|new Function|import\(|\bon[a-z]+=|style=",
)


def test_files_are_small() -> None:
    assert sum((STATIC / name).stat().st_size for name in OWN) <= 120_000
    for name in OWN:
        assert len((STATIC / name).read_text("utf-8").splitlines()) < 400


def test_vendored_files_are_listed_with_their_sums() -> None:
    folder = STATIC / "vendor"
    rows = re.findall(
        r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$",
        (folder / "README.md").read_text(),
        re.MULTILINE,
    )
    files = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "licenses"
    } - {"README.md"}
    assert {name for name, _ in rows} == files
    for name, digest in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("path", [*PAGES, *(f"/static/{name}" for name in OWN)])
def test_files_are_served_under_a_strict_policy(live: Live, path: str) -> None:
    file = STATIC / PAGES.get(path, path.removeprefix("/static/"))
    kinds = {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
        ".txt": "text/plain; charset=utf-8",
    }
    reply = live.http.get(path)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == kinds[file.suffix]
    assert reply.content == file.read_bytes()
    directives = dict(
        directive.strip().split(maxsplit=1)
        for directive in reply.headers["content-security-policy"].split(";")
    )
    assert directives == POLICY
    assert reply.headers["x-content-type-options"] == "nosniff"
    head = live.http.head(path)
    assert head.status_code == 200
    assert head.content == b""


def test_a_file_that_has_not_changed_is_not_sent_again(live: Live) -> None:
    path = "/static/vendor/swagger-ui-bundle.js"
    tag = live.http.get(path).headers["etag"]
    reply = live.http.get(path, headers={"If-None-Match": tag})
    assert (reply.status_code, reply.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["none.js", "vendor", "../pages.py", "%2e%2e/pages.py", "/etc/passwd"]
)
def test_nothing_else_is_served(live: Live, path: str) -> None:
    answer = exchange(
        live.url,
        f"GET /static/{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(),
    )
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"does not exist" in answer


@pytest.mark.parametrize("name", OWN)
def test_no_file_reaches_out_or_makes_html_of_texts(name: str) -> None:
    assert FORBIDDEN.findall((STATIC / name).read_text("utf-8")) == []


def test_the_pages_load_files_of_the_package_alone() -> None:
    for name in PAGES.values():
        for link in re.findall(r'(?:src|href)="([^"]*)"', (STATIC / name).read_text("utf-8")):
            file = STATIC / link.removeprefix("static/")
            assert link == "docs" or file.is_file()


def test_the_picture_of_the_page_is_up_to_date() -> None:
    """`python -m tests.serve.page.picture` makes docs/img/page.png and its record."""
    assert json.loads(RECORD.read_text()) == digests()


@pytest.mark.parametrize(
    "module", ["tests.serve.page.picture", "tests.data.fp8_caches.make", "tools.docs_site"]
)
def test_scripts_that_write_files_have_help(module: str) -> None:
    for flag, status, text in (("--help", 0, "usage: "), ("--hepl", 2, "unrecognized arg")):
        line = [sys.executable, "-m", module, flag]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and text in done.stdout + done.stderr
    assert json.loads(RECORD.read_text()) == digests()


def test_the_pages_are_no_part_of_the_api(live: Live) -> None:
    paths = live.http.get("/openapi.json").json()["paths"]
    assert not paths.keys() & PAGES.keys()
    assert live.http.get("/redoc").status_code == 404


def test_every_body_has_an_example(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    assert set(ROUTES) <= document["paths"].keys()
    bodies = [
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for operations in document["paths"].values()
        for operation in operations.values()
        if "requestBody" in operation
    ]
    assert len(bodies) == 8
    for body in bodies:
        assert document["components"]["schemas"][body.rpartition("/")[2]]["examples"]


def test_the_pages_ask_for_the_key_themselves() -> None:
    with running(FakeEngine(), api_key=("secret",)) as live:
        for path in (*PAGES, "/static/page.js"):
            assert live.http.get(path).status_code == 200
        assert live.http.get("/v1/models").status_code == 401


def test_there_may_be_no_page_to_talk() -> None:
    with running(FakeEngine(), disable_ui=True) as live:
        reply = live.http.get("/")
        assert reply.status_code == 404
        assert "does not exist" in reply.json()["error"]["message"]
        assert live.http.get("/docs").status_code == 200
