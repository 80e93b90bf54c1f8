"""The page at /: answers, settings, keys, looks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from fd_dsa.config import EngineConfig
from fd_dsa.startup.build import build_engine
from tests.chat.recorded import TOOLS
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, running, wait_until
from tests.serve.fake_engine import WORDS, FakeEngine
from tests.serve.page.conftest import choose, opened, profile, say, sent, serious
from tests.serve.test_tool_calls import V32, engine_of

ANSWER = "article.assistant .body"
MARKDOWN = """| language | since |
|---|--:|
| Python | 1991 |

> A quote.

3. First
   - nested

[link](https://example.org) **bold** `code`

```python
def topk(scores):  # the best
    return max(scores)
```
"""


@pytest.fixture
def live() -> Iterator[Live]:
    """A server whose answer is Markdown."""
    with running(FakeEngine(words=[MARKDOWN], max_model_len=1000)) as live:
        yield live


def test_an_answer_with_its_figures(browser: Browser) -> None:
    # words that come in one piece have no rate
    engine = FakeEngine(max_model_len=1000, step_s=0.02)
    with running(engine) as live, opened(browser, live) as page:
        say(page, "Hi")
        assert page.inner_text("article.user .body") == "Hi"
        assert page.inner_text(ANSWER) == "".join(WORDS)
        num_prompt = len(sent(live)[0])
        figures = page.inner_text(".stats").split(" · ")
        assert figures[:2] == [f"prompt {num_prompt}", f"output {len(WORDS)}"]
        assert figures[2].endswith(" tok/s") and figures[3].startswith("TTFT ")
        used = num_prompt + len(WORDS)
        expect(page.locator("#context")).to_have_text(f"{used} / 1000 tokens")
        # the next question brings the conversation so far
        say(page, "And?")
        assert sent(live)[0] == f"user:Hi\nassistant:{''.join(WORDS)}\nuser:And?\n>"


def test_settings_reach_the_request_and_stay(browser: Browser) -> None:
    numbers = {
        "temperature": "0.5",
        "top_p": "0.9",
        "top_k": "4",
        "min_p": "0.1",
        "seed": "7",
        "presence_penalty": "-1",
        "frequency_penalty": "0.5",
        "repetition_penalty": "1.5",
        "max_tokens": "3",
    }
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    texts = {"system": "Be brief.", "stop_strings": "END\n\\n\\n", "schema": json.dumps(schema)}
    with running(FakeEngine(max_model_len=1000)) as live, opened(browser, live) as page:
        choose(page, **numbers, **texts)
        page.select_option("#model", "alias")
        page.reload()
        expect(page.locator("#model")).to_have_value("alias")
        with page.expect_request("**/chat/completions") as request:
            say(page, "Hi")
        assert request.value.post_data_json["model"] == "alias"
        prompt, params = sent(live)
        assert prompt.startswith("system:Be brief.\nuser:Hi\n")
        assert {name: getattr(params, name) for name in numbers} == {
            name: float(value) for name, value in numbers.items()
        }
        assert list(params.stop_strings) == ["END", "\n\n"]
        assert params.structured_outputs.json == schema


def test_a_stopped_answer_has_its_figures(browser: Browser) -> None:
    # longer than any machine needs to stop it
    endless = FakeEngine(words=WORDS * 1000, step_s=0.05, max_model_len=10_000)
    with running(endless) as live, opened(browser, live) as page:
        page.fill("#input", "one")
        page.press("#input", "End")
        page.press("#input", "Shift+Enter")
        page.keyboard.type("two")
        assert page.input_value("#input") == "one\ntwo"
        assert live.engine.requests == {}
        page.keyboard.press("Enter")
        expect(page.locator(ANSWER)).to_contain_text("sparse")
        page.keyboard.press("Escape")
        figures = page.inner_text(".stats")
        assert re.fullmatch(
            r"stopped · output about \d+ · [\d.]+ tok/s · TTFT [\d.]+ s", figures
        ), figures
        assert "".join(WORDS * 1000).startswith(page.inner_text(ANSWER))
        wait_until(lambda: len(live.engine.closed) == 1)
        expect(page.locator("#send")).to_be_visible()


HOSTILE = (
    "<img src=x onerror='window.hacked=1'>",
    "<script>window.hacked=1</script>\n\n",
    "![x](https://example.org/x.png) [go](javascript:window.hacked=1) **bold** `<b>`\n\n",
    "[data](data:text/html,x) <a href='javascript:window.hacked=1'>raw</a>\n\n",
    "```html\n<h1 onclick='window.hacked=1'>code</h1>\n```\nend",
)


def test_texts_of_the_model_are_never_html(browser: Browser) -> None:
    engine = FakeEngine(words=HOSTILE, max_model_len=2000)
    with running(engine) as live, opened(browser, live) as page:
        say(page, "<i>Hi</i>")
        assert page.inner_text("article.user .body") == "<i>Hi</i>"
        assert page.locator("main :is(img, script, h1, [onclick], [onerror])").count() == 0
        hrefs = page.eval_on_selector_all("main a", "all => all.map((a) => a.getAttribute('href'))")
        assert set(hrefs) <= {None, "https://example.org/x.png"}
        shown = page.inner_text(ANSWER)
        assert HOSTILE[0] in shown and HOSTILE[1].strip() in shown
        assert page.inner_text(f"{ANSWER} pre") == "<h1 onclick='window.hacked=1'>code</h1>"
        assert page.evaluate("typeof window.hacked") == "undefined"


def test_markdown_and_copies(browser: Browser, live: Live) -> None:
    with opened(browser, live, permissions=["clipboard-read", "clipboard-write"]) as page:
        say(page, "Hi")
        body = page.locator(ANSWER)
        assert body.locator("td").all_inner_texts() == ["Python", "1991"]
        assert body.locator("td").last.get_attribute("align") == "right"
        assert body.locator("blockquote").inner_text() == "A quote."
        assert body.locator("ol > li > ul > li").inner_text() == "nested"
        assert body.locator("ol").get_attribute("start") == "3"
        link = body.locator("a")
        assert link.get_attribute("href") == "https://example.org"
        assert link.get_attribute("rel") == "noopener noreferrer"
        assert body.locator("pre .hljs-keyword").all_inner_texts() == ["def", "return"]
        code = MARKDOWN.partition("```python\n")[2].removesuffix("\n```\n")
        for place, text in ((".code-bar", code), (".actions", MARKDOWN)):
            button = page.locator(f"article.assistant {place} button").first
            button.click()
            expect(button).to_have_text("Copied")
            assert page.evaluate("navigator.clipboard.readText()") == text


def test_reasoning_and_tool_calls(browser: Browser) -> None:
    calls = V32.message.tool_calls
    with running(engine_of(V32)) as live, opened(browser, live) as page:
        choose(page, thinking="on", tools=json.dumps(TOOLS))
        say(page, "Hi")
        reasoning = page.locator("details.reasoning")
        assert reasoning.locator("div").text_content() == V32.message.reasoning
        figures = page.inner_text(".stats").split(" · ")
        assert figures[1] == f"output {len(V32.tokens)}"
        # usage counts the reasoning, and there are no drafts
        assert not any("draft" in figure for figure in figures)
        names = page.locator("details.call summary").all_inner_texts()
        assert names == [f"Tool call: {call.name}" for call in calls]
        assert page.locator("details.call pre").last.inner_text() == calls[-1].arguments
        # what is typed now are the results of the calls, in their order
        for index, call in enumerate(calls[:-1], 1):
            assert call.name in str(page.get_attribute("#input", "placeholder"))
            page.fill("#input", f"result of {call.name}")
            page.press("#input", "Enter")
            expect(page.locator("article.tool")).to_have_count(index)
        say(page, "the last result")
        prompt = sent(live)[0]
        assert "the last result" in prompt
        assert all(f"result of {call.name}" in prompt for call in calls[:-1])


def test_a_key_is_asked_for(browser: Browser) -> None:
    with (
        running(FakeEngine(), api_key=("secret",)) as live,
        profile(browser, live, fails=True, viewport={"width": 390, "height": 500}) as context,
    ):
        page = context.new_page()
        page.goto(live.url)
        expect(page.locator("#key")).to_be_focused()
        expect(page.locator("#key-wrong")).to_contain_text("This server asks for an API key")
        expect(page.locator("#key-wrong")).to_be_in_viewport(ratio=1)
        expect(page.locator("#fields")).to_have_js_property("scrollTop", 0)
        page.keyboard.press("Escape")
        expect(page.locator(".empty h2")).to_be_in_viewport(ratio=1)
        page.click("#settings-button")
        page.click("#settings summary")
        page.fill("#key", "none of its keys")
        page.press("#key", "Enter")
        expect(page.locator("#key-wrong")).to_contain_text("The server refused this API key")
        expect(page.locator("#key")).to_be_focused()
        page.fill("#key", "secret")
        page.click("#close-settings")
        expect(page.locator("#model")).to_have_value("demo")
        expect(page.locator("#notice")).to_be_hidden()
        say(page, "Hi")
        assert page.inner_text(ANSWER) == "".join(WORDS)
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_copied_command_asks_the_same(browser: Browser) -> None:
    clipboard = ["clipboard-read", "clipboard-write"]
    with (
        running(FakeEngine(max_model_len=1000)) as live,
        opened(browser, live, permissions=clipboard) as page,
    ):
        choose(page, seed="7", max_tokens="3", key="not needed")
        say(page, 'It\'s "quoted" $HOME `x` ü')
        prompt, params = sent(live)
        page.click("#curl")
        expect(page.locator("#curl")).to_have_text("Copied")
        command = page.evaluate("navigator.clipboard.readText()")
        assert "$FD_DSA_API_KEY" in command and "not needed" not in command
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
        assert done.stdout.rstrip().endswith("data: [DONE]")
        assert sent(live) == (prompt, params)


def test_a_phone(browser: Browser) -> None:
    engine = FakeEngine(words=["long" * 100, f"\n\n# Title\n\n{MARKDOWN}\n```\n{'x' * 300}\n```"])
    phone = {"viewport": {"width": 340, "height": 640}, "is_mobile": True, "has_touch": True}
    with running(engine) as live, opened(browser, live, **phone) as page:
        width = "document.documentElement.scrollWidth"
        assert page.get_attribute("#input", "enterkeyhint") == "send"
        assert page.evaluate("getComputedStyle(document.querySelector('#input')).fontSize") == (
            "16px"
        )
        assert page.locator(".keys").is_hidden()
        assert page.locator("#sidebar").is_hidden()
        say(page, "Hi")
        expect(page.locator("article h1")).to_have_css("opacity", "1")
        expect(page.locator("header h1")).to_have_css("opacity", "0")
        assert page.evaluate(width) <= 340
        assert serious(page) == []
        page.tap("#menu")
        assert page.evaluate(width) <= 340
        page.tap("#new")
        expect(page.locator("#sidebar")).to_be_hidden()
        page.tap("#settings-button")
        assert page.evaluate(width) <= 340
        assert page.evaluate("document.querySelector('#settings').scrollWidth") <= 340


def test_the_keyboard_alone(browser: Browser, live: Live) -> None:
    def focus(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            here = "[document.activeElement.textContent.trim(), document.activeElement.id]"
            if name in page.evaluate(here):
                return
        raise AssertionError(f"Tab does not reach {name}")

    with opened(browser, live) as page:
        focus("Settings")
        page.keyboard.press("Enter")
        focus("theme")
        page.keyboard.press("ArrowDown")
        expect(page.locator("html")).to_have_attribute("data-theme", "light")
        focus("system")
        page.keyboard.type("Be brief.")
        focus("Sampling")
        page.keyboard.press("Enter")
        focus("temperature")
        page.keyboard.type("hot")
        focus("Close")
        # nothing closes over a wrong value; the focus is at its field
        for key in ("Enter", *["Escape"] * 4):
            page.keyboard.press(key)
            expect(page.locator("#temperature")).to_be_focused()
        for _ in "hot":
            page.keyboard.press("Backspace")
        page.keyboard.press("Escape")
        expect(page.locator("#settings")).to_be_hidden()
        page.keyboard.press("Shift+Tab")
        focus("Hello! What can you do?")
        page.keyboard.press("Enter")
        expect(page.locator(".stats")).to_be_visible()
        assert sent(live)[0].startswith("system:Be brief.\nuser:Hello!")
        focus("Regenerate")
        page.keyboard.press("Enter")
        expect(page.locator(".versions")).to_contain_text("2 of 2")
        focus("Delete")
        page.keyboard.press("Enter")
        focus("Undo")
        page.keyboard.press("Enter")
        expect(page.locator("#chats .chat")).to_have_text("Hello! What can you do?")


def test_the_choice_of_the_indexer_is_drawn(browser: Browser) -> None:
    config = EngineConfig(max_model_len=512, max_num_seqs=4, index_topk=16)
    with running(threaded(build_engine(config))) as live, opened(browser, live) as page:
        page.click("#settings-button")
        page.fill("#max_tokens", "12")
        page.check("#topk")
        page.click("#close-settings")
        with page.expect_response("**/chat/completions") as response:
            say(page, "The sun is warm and the sea is blue. What is the capital of France?")
        events = [line[6:] for line in response.value.text().split("\n\n") if "topk_pos" in line]
        chosen = json.loads(events[-1])["choices"][0]["topk_positions"]
        size = chosen["position"] + 1
        assert size > 16
        # a pixel is coloured exactly where a layer chose a position
        drawn = page.evaluate(
            "(n) => { const c = document.querySelector('canvas'); "
            "const d = c.getContext('2d').getImageData(0, 0, c.width, "
            "c.height).data; const rows = []; for (let l = 0; l < n; l++) { rows.push([]); "
            "for (let x = 0; x < c.width; x++) if (d[4 * ((l * c.height / n + 3) * c.width + x)"
            " + 3]) rows[l].push(x); } return rows; }",
            len(chosen["layers"]),
        )
        assert drawn == chosen["layers"]
        captions = page.locator(".caption")
        assert "the indexer, a small scorer in each layer" in captions.first.inner_text()
        box = page.locator("canvas").bounding_box()
        assert box is not None
        target, layer = chosen["layers"][1][3], 1
        x = box["width"] * (target + 0.5) / size
        y = box["height"] * (layer + 0.5) / len(chosen["layers"])
        page.hover("canvas", position={"x": x, "y": y})
        expect(captions.last).to_contain_text(f"layer {layer}, position {target} ")
        assert f": selected; this layer selected 16 of {size}" in captions.last.inner_text()
        # it is of this tab alone
        page.reload()
        expect(page.locator("#chats .chat")).to_have_count(1)
        page.click("#chats .chat")
        expect(page.locator("article")).to_have_count(2)
        assert page.locator("canvas").count() == 0
