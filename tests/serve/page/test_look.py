"""The looks of the page: language, theme, sizes.

FD_DSA_SCREENSHOTS=FOLDER makes `test_every_look` write its pictures there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.serve.conftest import Live, running
from tests.serve.fake_engine import WORDS, FakeEngine
from tests.serve.page.conftest import choose, open_settings, opened, profile, say

LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
MARKDOWN = """DeepSeek Sparse Attention reads only the keys that an indexer selects.

| layer | selected |
|---|--:|
| 0 | 2048 |

```python
def topk(scores, k):  # the best
    return sorted(scores)[-k:]
```
"""
# words that are the same in Chinese: names, units, the model, the texts of the test itself
NAMES = {
    *("fd_dsa", "demo", "alias", "API", "JSON", "schema", "curl", "token", "Enter", "Shift"),
    *("Esc", "Top", "Min", "English", "Language", "DeepSeek", "Question"),
}
# every text that a reader sees or hears
SEEN = """() => {
    const found = [];
    const isShown = (node) => node.checkVisibility({ visibilityProperty: true });
    for (const node of document.querySelectorAll("body *")) {
        if (!isShown(node)) continue;
        for (const child of node.childNodes) if (child.nodeType === 3) found.push(child.data);
        for (const name of ["aria-label", "placeholder", "title"]) {
            found.push(node.getAttribute(name) ?? "");
        }
    }
    return found;
}"""
SELECTION = {
    "position": 3,
    "layers": [[0, 1], [2, 3]],
    "tokens": ["a", "b", "c", "d"],
}
# draws a selection; `import` of the page is the same module
PICTURE = """async (chosen) => {
    const { picture } = await import("./static/picture.js");
    const article = document.createElement("article");
    article.append(picture(chosen));
    document.querySelector("#log").append(article);
}"""


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server that every test leaves as it was."""
    with running(FakeEngine(words=[MARKDOWN], max_model_len=4000)) as live:
        yield live


def background(page: Page) -> str:
    """The colour of the page."""
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize(
    ("locale", "language", "send"),
    [
        ("en-US", "en", "Send"),
        ("zh-CN", "zh-CN", "发送"),
        ("zh-TW", "zh-CN", "发送"),
        ("fr-FR", "en", "Send"),
    ],
)
def test_the_language_is_the_browser_s(
    browser: Browser, live: Live, locale: str, language: str, send: str
) -> None:
    with opened(browser, live, locale=locale) as page:
        expect(page.locator("html")).to_have_attribute("lang", language)
        expect(page.locator("#send")).to_have_text(send)


def test_a_selected_language_stays(browser: Browser) -> None:
    endless = FakeEngine(words=WORDS * 1000, step_s=0.05, max_model_len=10_000)
    with running(endless) as live, opened(browser, live) as page:
        page.fill("#input", "Hi")
        page.press("#input", "Enter")
        expect(page.locator("article.assistant .body")).to_contain_text("sparse")
        # an answer goes on meanwhile, and a question that is being edited keeps its text
        page.locator("article.user").get_by_text("Edit").click()
        page.fill("article textarea", "Changed")
        page.click("#settings-button")
        page.select_option("#language", "zh-CN")
        expect(page.locator("#close-settings")).to_have_text("关闭")
        page.click("#close-settings")
        expect(page.locator("#send")).to_have_text("发送")
        expect(page.locator("#stop")).to_be_visible()
        assert page.input_value("article textarea") == "Changed"
        page.press("article textarea", "Escape")
        page.keyboard.press("Escape")
        expect(page.locator(".stats")).to_contain_text("已停止")
        expect(page.locator("article.user button")).to_have_text(["复制", "编辑"])
        assert page.get_attribute("#log", "aria-label") == "对话"
        assert page.get_attribute("article.user", "aria-label") == "你"
        page.reload()
        expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
        expect(page.locator("#send")).to_have_text("发送")
        page.click("#settings-button")
        page.select_option("#language", "")
        expect(page.locator("html")).to_have_attribute("lang", "en")
        page.click("#close-settings")
        expect(page.locator("article.user button")).to_have_text(["Copy", "Edit"])


def test_what_the_server_says_is_in_the_language(browser: Browser) -> None:
    with (
        running(FakeEngine(), api_key=("secret",)) as live,
        profile(browser, live, fails=True) as context,
    ):
        page = context.new_page()
        page.goto(live.url)
        expect(page.locator("#key-wrong")).to_contain_text("asks for an API key")
        page.select_option("#language", "zh-CN")
        expect(page.locator("#key-wrong")).to_contain_text("此服务器需要 API 密钥")
        expect(page.locator("#notice-text")).to_contain_text("此服务器需要 API 密钥")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        live.state.draining = True
        page.fill("#input", "Hi")
        page.press("#input", "Enter")
        expect(page.locator("#trouble")).to_contain_text("服务器正在关闭")
        page.click("#settings-button")
        page.select_option("#language", "en")
        expect(page.locator("#trouble")).to_contain_text("The server is shutting down")
        page.click("#close-settings")
        page.click("#stop")
        live.state.draining = False


def test_no_english_is_left_in_chinese(browser: Browser, live: Live) -> None:
    def check() -> None:
        # code and answers of the model are as the model writes them
        page.eval_on_selector_all("article .body", "all => all.forEach((e) => e.remove())")
        words = re.findall(r"[A-Za-z_]{3,}", "\n".join(page.evaluate(SEEN)))
        assert set(words) <= NAMES

    with opened(browser, live, locale="zh-CN") as page:
        check()
        say(page, "Question")
        page.evaluate(PICTURE, SELECTION)
        page.hover("canvas")
        page.click(".picture details summary")
        check()
        page.locator("article.assistant .actions button").last.click()
        expect(page.locator(".versions")).to_contain_text("第 2 / 2 版")
        check()
        page.locator("article.user .actions button").last.click()
        check()
        page.click("#chats .actions button:last-child")
        expect(page.locator("#toast")).to_contain_text("已删除")
        page.fill("#search", "Question")
        check()
        open_settings(page)
        for name in ("temperature", "top_p", "repetition_penalty", "max_tokens", "seed", "tools"):
            page.fill(f"#{name}", "?")
        page.fill("#key", "ключ")
        page.click("#close-settings")
        # a browser says in its own language what is wrong with JSON
        page.fill("#tools", "{}")
        check()


def test_a_selected_theme_stays(browser: Browser, live: Live) -> None:
    with opened(browser, live, color_scheme="light") as page:
        assert background(page) == LIGHT
        page.click("#settings-button")
        page.select_option("#theme", "dark")
        assert background(page) == DARK
        page.reload()
        expect(page.locator("#theme")).to_have_value("dark")
        assert background(page) == DARK
        page.goto(f"{live.url}/docs")
        expect(page.locator("html.dark-mode")).to_be_attached()
        page.goto(live.url)
        page.click("#settings-button")
        page.select_option("#theme", "")
        assert background(page) == LIGHT
        page.emulate_media(color_scheme="dark")
        assert background(page) == DARK
        page.select_option("#theme", "light")
        assert background(page) == LIGHT


@pytest.mark.parametrize(("touch", "word"), [(False, "Hover over"), (True, "Tap")])
def test_a_mark_is_hovered_or_tapped(browser: Browser, live: Live, touch: bool, word: str) -> None:
    with opened(browser, live, is_mobile=touch, has_touch=touch) as page:
        page.evaluate(PICTURE, SELECTION)
        expect(page.locator(".caption").last).to_contain_text(f"{word} a mark")
        if touch:
            page.tap("canvas", position={"x": 1, "y": 1})
        else:
            page.hover("canvas", position={"x": 1, "y": 1})
        expect(page.locator(".caption").last).to_contain_text("layer 0, position 0")


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 860), (390, 664)])
def test_every_look(
    browser: Browser, live: Live, width: int, height: int, scheme: str, locale: str
) -> None:
    """Axe finds nothing, and nothing is wider than the window."""

    def look(name: str) -> None:
        assert Axe().run(page).response["violations"] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if folder := os.environ.get("FD_DSA_SCREENSHOTS"):
            path = Path(folder) / f"{width}-{scheme}-{locale[:2]}-{name}.png"
            page.screenshot(path=path)

    is_phone = width < 800
    options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    options |= {"locale": locale, "is_mobile": is_phone, "has_touch": is_phone}
    with opened(browser, live, **options) as page:
        assert background(page) == (DARK if scheme == "dark" else LIGHT)
        look("empty")
        page.locator(".examples button").first.click()
        expect(page.locator(".stats")).to_be_visible()
        look("answer")
        page.evaluate(PICTURE, SELECTION)
        page.locator("canvas").scroll_into_view_if_needed()
        look("selection")
        if is_phone:
            page.click("#menu")
            look("chats")
            page.click("#menu")
        page.click("#settings-button")
        look("settings")
        page.click("#close-settings")
        open_settings(page)
        page.fill("#temperature", "hot")
        page.click("#close-settings")
        look("wrong")
        page.fill("#temperature", "")
        page.click("#close-settings")
        choose(page, seed="7")
        page.click("#settings-button")
        look("set")
