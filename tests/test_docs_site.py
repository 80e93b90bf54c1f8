"""The documentation site: links, the search in both languages, the Python reference."""

from __future__ import annotations

import html
import inspect
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

import fd_dsa
import fd_dsa.ops
from tools import docs_site

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = (ROOT / "docs/python.md").read_text("utf-8")


def _folder(parent: Path) -> Path:
    """A folder with the pages, the builder's configuration and the code."""
    docs_site.lay_out(parent)
    shutil.copy(ROOT / "zensical.toml", parent)
    (parent / "fd_dsa").symlink_to(ROOT / "fd_dsa")
    return parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    pytest.importorskip("zensical", reason="zensical (extra docs) is not installed")
    folder = _folder(tmp_path_factory.mktemp("docs"))
    assert docs_site.build(folder)
    return folder / "build/docs"


@pytest.mark.slow
def test_the_site_comes_from_one_origin(site: Path) -> None:
    for name in ("index.html", "docs/python.html"):
        page = (site / name).read_text("utf-8")
        assert not re.search(r"<(link|script)[^>]*(href|src)=\"?https?:", page)


@pytest.mark.slow
def test_a_broken_link_ends_the_build(
    site: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pages = _folder(tmp_path) / "build/pages"
    # docstrings take most of the time of a build
    (pages / "docs/python.md").write_text("[a](flags.md#missing)", "utf-8")
    assert not docs_site.build(tmp_path)
    assert "anchor does not exist" in capfd.readouterr().err


@pytest.mark.slow
def test_the_search_knows_both_languages(site: Path) -> None:
    index = json.loads((site / "search.json").read_text("utf-8"))
    assert index["config"]["lang"] == ["en", "zh"]
    texts = {item["location"]: item["text"] for item in index["items"]}
    assert any("张量并行" in text for place, text in texts.items() if ".zh.html" in place)


@pytest.mark.slow
def test_pages_name_their_language(site: Path) -> None:
    pages = [*site.glob("README*.html"), *site.glob("docs/*.html")]
    assert len(pages) > 20
    for page in [*pages, site / "index.html"]:
        language = "zh-CN" if page.name.endswith(".zh.html") else "en"
        assert f'<html lang="{language}"' in page.read_text("utf-8"), page.name


def _documented() -> dict[str, Any]:
    """Path of each object of the reference -> the object."""
    paths = re.findall(r"^::: ([\w.]+)$", REFERENCE, flags=re.MULTILINE)
    parts = [path.rpartition(".") for path in paths]
    return {
        path: getattr(import_module(module), name)
        for path, (module, _, name) in zip(paths, parts, strict=True)
    }


def test_every_public_name_is_in_the_reference() -> None:
    objects = list(_documented().values())
    for module in (fd_dsa, fd_dsa.ops):
        for name in module.__all__:
            assert name == "__version__" or getattr(module, name) in objects, name


@pytest.mark.slow
def test_the_reference_shows_docstrings(site: Path) -> None:
    page = (site / "docs/python.html").read_text("utf-8")
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())
    for path, item in _documented().items():
        assert f'id="{path}"' in page
        first = (inspect.getdoc(item) or "").partition("\n\n")[0].replace("`", "")
        assert " ".join(first.split()) in text, path
    # a parameter with its type and what it means
    assert "tensor_parallel_size" in text and "max_tokens" in text
    assert "maximum number of output tokens, >= 1; None = the rest of the context." in text


@pytest.fixture
def site_url(site: Path) -> Iterator[str]:
    """Address of a local server with the site."""
    handler = partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium."""
    command = shutil.which("chromium") or shutil.which("chromium-browser")
    if command is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=command, args=args)
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("预填充", "docs/several-gpus.zh.html"),
        ("端口被占用", "docs/troubleshooting.zh.html"),
        ("tensor parallelism", "docs/glossary.html"),
    ],
)
def test_the_search_finds_words(browser: Browser, site_url: str, query: str, found: str) -> None:
    page = browser.new_page()
    page.goto(f"{site_url}/docs/quickstart.html")
    page.click(".md-search__button")
    page.keyboard.type(query)
    expect(page.locator(f'a[href*="{found}?h="]').first).to_be_visible(timeout=30_000)
    page.close()
