"""/docs in a browser: Swagger UI under the strict policy, against the demo model."""

from __future__ import annotations

import subprocess

from playwright.sync_api import Browser, expect

from fd_dsa.config import EngineConfig
from fd_dsa.startup.build import build_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import running
from tests.serve.page.conftest import profile

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/models")


def test_every_example_and_command_is_answered_on_a_phone(browser: Browser) -> None:
    engine = threaded(build_engine(EngineConfig(max_model_len=512, max_num_seqs=4)))
    phone = {"viewport": {"width": 360, "height": 800}, "is_mobile": True}
    with running(engine) as live, profile(browser, live, **phone) as context:
        page = context.new_page()
        page.goto(f"{live.url}/docs")
        for path in PATHS:
            here = page.locator(f'[data-path="{path}"]')
            block = page.locator(".opblock").filter(has=here)
            block.locator(".opblock-summary-control").click()
            with page.expect_response(f"{live.url}{path}") as response:
                block.get_by_role("button", name="Execute").click()
            assert response.value.status == 200, response.value.text()
            status = block.locator(".live-responses-table .response-col_status")
            expect(status.last).to_contain_text("200")
            command = block.locator(".opblock-description pre").inner_text().strip()
            asked = ["bash", "-c", f"{command} -sS -o /dev/null -w '%{{http_code}}'"]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
            assert done.stdout == "200", (command, done.stderr)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
