"""The system's browser, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Page,
    Playwright,
    expect,
    sync_playwright,
)

from tests.serve.conftest import Live

# of the system; firefox as CONTRIBUTING.md says
BROWSER = os.environ.get("FD_DSA_TEST_BROWSER", "chromium")
_COMMAND = shutil.which(BROWSER) or shutil.which(f"{BROWSER}-browser")
# a loaded machine may be slow
expect.set_options(timeout=30_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are slow, and need the browser."""
    folder = f"{Path(__file__).parent}{os.sep}"
    for item in items:
        if str(item.path).startswith(folder):
            item.add_marker(pytest.mark.slow)
            reason = f"{BROWSER} is not installed: apt-get install {BROWSER}"
            item.add_marker(pytest.mark.skipif(_COMMAND is None, reason=reason))


@contextmanager
def launched(playwright: Playwright) -> Iterator[Browser]:
    """The browser of the system, headless."""
    args = ["--no-sandbox"] if os.geteuid() == 0 and BROWSER == "chromium" else []
    kind, channel = ("chromium", None) if BROWSER == "chromium" else ("firefox", "moz-firefox")
    launch = getattr(playwright, kind).launch
    browser = launch(executable_path=_COMMAND, args=args, channel=channel)
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser, one for the tests of a file."""
    with sync_playwright() as playwright, launched(playwright) as browser:
        yield browser


needs_chromium = pytest.mark.skipif(
    BROWSER != "chromium", reason="playwright cannot do that with a Firefox of the system"
)


@contextmanager
def profile(browser: Browser, live: Live, *, fails: bool = False, **options: Any) -> Iterator[Any]:
    """A fresh browser profile; every page of it asks this server alone and has no problem.

    Args:
        browser: that runs it.
        live: the server.
        fails: requests of the pages may fail.
        options: of `Browser.new_context`.
    """
    problems: list[str] = []
    with browser.new_context(**{"viewport": {"width": 1000, "height": 800}, **options}) as context:
        context.set_default_timeout(30_000)

        def note(text: str) -> None:
            if not (fails and text.startswith("Failed to load resource")):
                problems.append(text)

        # refused by the policy: an error of the console too
        context.on("console", lambda m: note(m.text) if m.type in ("error", "warning") else None)
        context.on("weberror", lambda e: note(str(e.error)))
        context.on("request", lambda r: r.url.startswith((live.url, "data:")) or note(r.url))
        yield context
        assert problems == []


def open_page(context: BrowserContext, live: Live) -> Page:
    """A new tab with the page to talk to the model."""
    page = context.new_page()
    page.goto(live.url)
    page.locator("#model option").first.wait_for(state="attached")
    return page


@contextmanager
def opened(browser: Browser, live: Live, **options: Any) -> Iterator[Page]:
    """The page to talk to the model, in a profile of its own."""
    with profile(browser, live, **options) as context:
        yield open_page(context, live)


def say(page: Page, text: str) -> None:
    """Send a message, and wait for the end of its answer."""
    count = page.locator("article.assistant").count()
    page.fill("#input", text)
    page.press("#input", "Enter")
    expect(page.locator("article.assistant")).to_have_count(count + 1)
    expect(page.locator("#send")).to_be_visible()


def open_settings(page: Page) -> None:
    """Open the settings, with all their groups."""
    page.click("#settings-button")
    page.eval_on_selector_all("#settings details", "all => all.forEach((d) => { d.open = true; })")


def choose(page: Page, **settings: str) -> None:
    """Fill in fields of the settings."""
    open_settings(page)
    for name, value in settings.items():
        field = page.locator(f"#{name.replace('_strings', '-strings')}")
        if name in ("thinking", "model"):
            field.select_option(value)
        else:
            field.fill(value)
    page.click("#close-settings")


def sent(live: Live) -> tuple[str, Any]:
    """Prompt and parameters of the latest request."""
    prompt, params = list(live.engine.requests.values())[-1]
    return bytes(token for token in prompt if token < 256).decode(), params


def serious(page: Page) -> list[str]:
    """Findings of axe that are serious or critical."""
    found = Axe().run(page).response["violations"]
    return [str(one) for one in found if one["impact"] in ("serious", "critical")]
