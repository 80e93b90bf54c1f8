"""The settings dialog: groups, a message at each wrong field, buttons in every window."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from fd_dsa.engine.sampling_params import SamplingParams
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.page.conftest import choose, open_settings, opened, say, sent

NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "seed",
)
VALUES = ("-3", "-2", "-1", "-0.5", "0", "0.5", "1", "1.5", "2", "2.5", "7", "many", "1,5", "1e999")
WRONG = {
    "temperature": ("hot", 'Got "hot"; must be a number, 0 or more, or empty.'),
    "top_p": ("1.5", 'Got "1.5"; must be a number from 0 to 1, or empty.'),
    "repetition_penalty": ("0", 'Got "0"; must be a number above 0, or empty.'),
    "max_tokens": ("2.5", 'Got "2.5"; must be a whole number, 1 or more, or empty.'),
    "schema": ("[1]", 'Got "[1]"; must be a JSON object, or empty.'),
    "tools": ("{}", 'Got "{}"; must be a JSON array, or empty.'),
    "stop-strings": ("\n".join("x" * 65), "Got 65 lines, the longest of 1 characters, 65 in all"),
    "key": ("my ключ", 'Got the character "к"; must be Latin'),
}
# width and height; the second and third are phones, the third with its keyboard open
WINDOWS = ((1280, 860), (390, 664), (390, 340), (844, 390), (340, 480))


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server that every test leaves as it was."""
    with running(FakeEngine(max_model_len=4000)) as live:
        yield live


def is_wrong(page: Page, name: str, value: str) -> bool:
    """Leave the field with this value, and return if it is marked."""
    page.fill(f"#{name}", value)
    page.dispatch_event(f"#{name}", "change")
    return page.get_attribute(f"#{name}", "aria-invalid") == "true"


def test_the_page_has_the_ranges_of_the_server(browser: Browser, live: Live) -> None:
    def is_refused(name: str, text: str) -> bool:
        try:
            value = json.loads(text)
            SamplingParams(**{name: value})
        except ValueError:
            return True
        return False

    with opened(browser, live) as page:
        open_settings(page)
        for name in NUMBERS:
            found = {value: is_wrong(page, name, value) for value in VALUES}
            assert found == {value: is_refused(name, value) for value in VALUES}, name


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_keeps_the_dialog_open(browser: Browser, live: Live, name: str) -> None:
    value, message = WRONG[name]
    field, text = f"#{name}", f"#{name}-wrong"
    phone = {"width": 390, "height": 500}
    with opened(browser, live, viewport=phone) as page:
        open_settings(page)
        page.fill(field, value)
        page.click("#settings-title")
        expect(page.locator(text)).to_contain_text(message)
        assert page.get_attribute(field, "aria-describedby") == text[1:]
        # its group may be folded meanwhile
        page.eval_on_selector_all("#settings details", "all => all.forEach((d) => d.open = false)")
        page.click("#close-settings")
        expect(page.locator(field)).to_be_focused()
        for place in (field, text):
            expect(page.locator(place)).to_be_in_viewport(ratio=1)
        # the message goes with the first right value, and the dialog closes
        page.fill(field, "")
        expect(page.locator(text)).to_have_text("")
        page.click("#close-settings")
        expect(page.locator("#settings")).to_be_hidden()


def test_a_wrong_value_of_an_earlier_version_is_named_before_sending(browser: Browser) -> None:
    with running(FakeEngine(max_model_len=1000)) as live, opened(browser, live) as page:
        kept = json.dumps({"seed": "many"})
        page.evaluate("kept => localStorage.setItem('fd_dsa.settings', kept)", kept)
        page.reload()
        page.fill("#input", "Hi")
        page.click("#send")
        expect(page.locator("#seed")).to_be_focused()
        expect(page.locator("#seed-wrong")).to_contain_text('Got "many"')
        assert page.input_value("#input") == "Hi"
        assert live.engine.requests == {}
        page.click("#reset")
        expect(page.locator("#seed-wrong")).to_have_text("")
        page.keyboard.press("Escape")
        page.click("#send")
        expect(page.locator(".stats")).to_be_visible()
        assert sent(live)[0] == "user:Hi\n>"


def test_groups_show_what_is_set(browser: Browser, live: Live) -> None:
    with opened(browser, live) as page:
        page.click("#settings-button")
        expect(page.locator("#settings-title")).to_be_focused()
        groups = page.locator("#settings details[open] > summary")
        expect(groups).to_have_text(["Answer"])
        page.click("#close-settings")
        choose(page, seed="7", stop_strings="END")
        page.reload()
        page.click("#settings-button")
        expect(groups).to_have_text(["Answer", "Sampling", "Stop strings, JSON schema, tools"])
        page.click("#close-settings")
        say(page, "Hi")
        assert sent(live)[1].seed == 7


@pytest.mark.parametrize(("width", "height"), WINDOWS)
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_buttons_are_never_cut(
    browser: Browser, live: Live, width: int, height: int, locale: str
) -> None:
    window = {"width": width, "height": height}
    with opened(browser, live, viewport=window, locale=locale) as page:
        open_settings(page)
        page.fill("#temperature", "hot")
        page.click("#close-settings")
        # with a message, every group open, at the top and at the bottom
        page.eval_on_selector_all("#settings details", "all => all.forEach((d) => d.open = true)")
        for end in (0, 10_000):
            page.evaluate("end => { document.querySelector('#fields').scrollTop = end; }", end)
            for name in ("#close-settings", "#reset", "#settings-title"):
                expect(page.locator(name)).to_be_in_viewport(ratio=1)
        overflow = "e => e.scrollWidth > e.clientWidth"
        assert not page.eval_on_selector("#settings", overflow)
        assert not page.eval_on_selector("#fields", overflow)


@pytest.mark.parametrize("width", [340, 390, 860, 1280])
def test_labels_of_buttons_have_one_line(browser: Browser, live: Live, width: int) -> None:
    lines = """all => all.map((node) => {
        const range = document.createRange();
        range.selectNodeContents(node);
        return [node.textContent, new Set([...range.getClientRects()].map((r) => r.top)).size];
    }).filter(([, count]) => count > 1)"""
    window = {"width": width, "height": 860}
    with opened(browser, live, viewport=window) as page:
        say(page, "Hi")
        # a long message takes all the room that it can get
        page.evaluate(
            "() => { document.querySelector('#notice').hidden = false; "
            "document.querySelector('#notice-text').textContent = 'word '.repeat(80); }"
        )
        page.click("#settings-button")
        assert page.eval_on_selector_all("button", lines) == []
