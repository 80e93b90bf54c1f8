"""/docs in a browser: Swagger UI under the strict policy, against the demo model."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from fd_dsa.config import EngineConfig
from fd_dsa.engine.factory import build_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, running
from tests.serve.page.conftest import profile

POSTS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server of the demo model."""
    engine = threaded(build_engine(EngineConfig(max_model_len=512, max_num_seqs=4)))
    with running(engine) as live:
        yield live


@pytest.mark.parametrize("width", [360, 1100])
def test_every_example_is_answered(browser: Browser, live: Live, width: int) -> None:
    size = {"viewport": {"width": width, "height": 800}, "is_mobile": width < 500}
    with profile(browser, live, **size) as context:
        page = context.new_page()
        page.goto(f"{live.url}/docs")
        for path in POSTS:
            block = page.locator(".opblock-post").filter(has=page.locator(f'[data-path="{path}"]'))
            block.locator(".opblock-summary-control").click()
            with page.expect_response(f"{live.url}{path}") as response:
                block.get_by_role("button", name="Execute").click()
            assert response.value.status == 200, response.value.text()
            expect(
                block.locator(".live-responses-table .response-col_status").last
            ).to_contain_text("200")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_command_is_answered(browser: Browser, live: Live) -> None:
    with profile(browser, live) as context:
        page = context.new_page()
        page.goto(f"{live.url}/docs")
        blocks = page.locator(".opblock")
        expect(blocks.first).to_be_visible()
        paths = live.http.get("/openapi.json").json()["paths"]
        assert blocks.count() == len(paths)
        for index in range(blocks.count()):
            blocks.nth(index).locator(".opblock-summary-control").click()
            command = blocks.nth(index).locator(".opblock-description pre").inner_text()
            command = command.replace("{name}", "demo").strip()
            asked = ["bash", "-c", f"{command} -fsS -o /dev/null -w '%{{http_code}}'"]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
            assert done.stdout == "200", (command, done.stderr)
