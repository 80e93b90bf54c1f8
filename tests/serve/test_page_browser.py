"""The page at / in a headless Chromium, over a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.config import EngineConfig
from fd_dsa.engine.factory import build_engine
from tests.chat.recorded import TOOLS
from tests.engine.threaded import threaded
from tests.serve.chromium import CHROMIUM, Tab, open_tab
from tests.serve.conftest import Live, running, wait_until
from tests.serve.fake_engine import WORDS, FakeEngine
from tests.serve.test_tool_calls import V32, engine_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


@contextmanager
def page(
    folder: Path, engine: FakeEngine | None = None, size: tuple[int, int] = (900, 800)
) -> Iterator[tuple[Tab, Live]]:
    """A tab that shows the page of a server; what it asks for must come from that server."""
    engine = engine or FakeEngine(max_model_len=1000)
    with running(engine) as live, open_tab(folder, size) as tab:
        tab.open(f"{live.url}/")
        tab.wait_for("document.getElementById('model').textContent === 'demo'")
        yield tab, live
        assert {url.startswith((f"{live.url}/", "data:")) for url in tab.requests} == {True}
        assert tab.problems == []


def say(tab: Tab, text: str) -> None:
    """Send a message, and wait for the end of its answer."""
    count = tab.evaluate("document.querySelectorAll('.stats').length")
    tab.evaluate("document.getElementById('input').focus()")
    tab.type(text)
    tab.press("Enter")
    tab.wait_for(f"document.querySelectorAll('.stats').length > {count} && !state.running")


def choose(tab: Tab, **settings: str) -> None:
    """Fill in fields of the settings."""
    for name, value in settings.items():
        tab.evaluate(
            f"$({json.dumps(name)}).value = {json.dumps(value)};"
            f"$({json.dumps(name)}).dispatchEvent(new Event('change'))"
        )


def last(tab: Tab, selector: str) -> str:
    """Text of the last element."""
    return str(tab.evaluate(f"[...document.querySelectorAll({selector!r})].at(-1).textContent"))


def sent(live: Live) -> tuple[str, Any]:
    """Prompt and parameters of the latest request."""
    prompt, params = list(live.engine.requests.values())[-1]
    return bytes(token for token in prompt if token < 256).decode(), params


def test_an_answer_with_its_figures(tmp_path: Path) -> None:
    with page(tmp_path) as (tab, live):
        say(tab, "Hi")
        assert last(tab, "article.user") == "Hi"
        assert last(tab, "article.assistant p:not([class])") == "".join(WORDS)
        num_prompt = len(sent(live)[0])
        figures = last(tab, ".stats").split(" · ")
        assert figures[:2] == [f"prompt {num_prompt}", f"output {len(WORDS)}"]
        assert figures[2].endswith(" tok/s")
        assert figures[3].startswith("TTFT ")
        used = num_prompt + len(WORDS)
        assert tab.evaluate("$('context').textContent") == f"{used} / 1000 tokens"
        assert tab.evaluate("$('used').style.width") == f"{used / 10:g}%"
        # the next question brings the conversation so far
        say(tab, "And?")
        assert sent(live)[0] == f"user:Hi\nassistant:{''.join(WORDS)}\nuser:And?\n>"


def test_settings_reach_the_request(tmp_path: Path) -> None:
    with page(tmp_path) as (tab, live):
        choose(tab, system="Be brief.", temperature="0.5", top_p="0.9", max_tokens="3", seed="7")
        say(tab, "Hi")
        prompt, params = sent(live)
        assert prompt.startswith("system:Be brief.\nuser:Hi\n")
        assert (params.temperature, params.top_p) == (0.5, 0.9)
        assert (params.max_tokens, params.seed) == (3, 7)
        assert last(tab, "article.assistant p:not([class])") == "".join(WORDS[:3])


def test_shift_enter_is_a_line_and_escape_stops(tmp_path: Path) -> None:
    # longer than any machine needs to stop it
    endless = FakeEngine(words=WORDS * 1000, step_s=0.1, max_model_len=10_000)
    with page(tmp_path, endless) as (tab, live):
        tab.evaluate("$('input').focus()")
        tab.type("one")
        tab.press("Enter", shift=True)
        tab.type("two")
        assert tab.evaluate("$('input').value") == "one\ntwo"
        assert live.engine.requests == {}
        tab.press("Enter")
        tab.wait_for("document.querySelector('article.assistant p:not([class])')")
        assert tab.evaluate("$('stop').hidden") is False
        tab.press("Escape")
        tab.wait_for("document.querySelector('.stats')")
        assert last(tab, ".stats") == "stopped"
        assert "".join(WORDS * 1000).startswith(last(tab, "article.assistant p:not([class])"))
        wait_until(lambda: len(live.engine.closed) == 1)
        assert tab.evaluate("$('send').hidden") is False


HOSTILE = (
    "<img src=x onerror='window.hacked=1'>",
    "<script>window.hacked=1</script>\n",
    "[go](javascript:window.hacked=1) **bold** `<b>`\n\n- an *item*\n\n",
    "```html\n<h1>code</h1>\n```\nend",
)


def test_texts_of_the_model_are_never_html(tmp_path: Path) -> None:
    with page(tmp_path, FakeEngine(words=HOSTILE, max_model_len=1000)) as (tab, _):
        say(tab, "<i>Hi</i>")
        assert tab.evaluate("document.querySelectorAll('main :is(img, script, a)').length") == 0
        assert tab.evaluate("typeof window.hacked") == "undefined"
        assert last(tab, "article.user") == "<i>Hi</i>"
        shown = tab.evaluate("document.querySelector('article.assistant').textContent")
        assert HOSTILE[0] + HOSTILE[1].strip() in shown
        assert "[go](javascript:window.hacked=1)" in shown
        assert last(tab, "article.assistant strong") == "bold"
        assert last(tab, "article.assistant li em") == "item"
        assert last(tab, "article.assistant p > code") == "<b>"
        assert last(tab, "article.assistant pre code") == "<h1>code</h1>"


def test_reasoning_and_tool_calls(tmp_path: Path) -> None:
    calls = V32.message.tool_calls
    with page(tmp_path, engine_of(V32)) as (tab, live):
        choose(tab, thinking="on", tools=json.dumps(TOOLS))
        say(tab, "Hi")
        assert last(tab, "details.reasoning div") == V32.message.reasoning
        names = tab.evaluate(
            "[...document.querySelectorAll('details.call summary')].map((n) => n.textContent)"
        )
        assert names == [f"Tool call: {call.name}" for call in calls]
        assert last(tab, "details.call pre code") == calls[-1].arguments
        # folded by hand, it stays folded when the page draws it again
        tab.evaluate("document.querySelector('details.reasoning summary').click()")
        folded = tab.evaluate("document.querySelector('details.reasoning').open")
        # what is typed now are the results of the calls, in their order
        for call in calls[:-1]:
            assert call.name in tab.evaluate("$('input').placeholder")
            tab.type(f"result of {call.name}")
            tab.press("Enter")
        tab.wait_for(f"document.querySelectorAll('article.tool').length === {len(calls) - 1}")
        assert tab.evaluate("document.querySelector('details.reasoning').open") == folded
        say(tab, "the last result")
        prompt = sent(live)[0]
        assert "the last result" in prompt
        assert all(f"result of {call.name}" in prompt for call in calls[:-1])


def test_conversations_survive_the_tab(tmp_path: Path) -> None:
    with page(tmp_path) as (tab, live):
        choose(tab, system="Be brief.")
        say(tab, "Hi")
        tab.open(f"{live.url}/?again")
        tab.wait_for("document.getElementById('model').textContent")
        titles = "[...$('chats').options].map((o) => o.textContent)"
        assert tab.evaluate(titles) == ["New conversation", "Hi"]
        assert tab.evaluate("$('system').value") == "Be brief."
        tab.evaluate("$('chats').selectedIndex = 1; $('chats').dispatchEvent(new Event('change'))")
        assert last(tab, "article.assistant p:not([class])") == "".join(WORDS)
        tab.evaluate("$('delete').click()")
        assert tab.evaluate(titles) == ["New conversation"]
        assert tab.evaluate("localStorage.getItem('fd_dsa.chats')") == "[]"


def test_refusals_are_shown(tmp_path: Path) -> None:
    with running(FakeEngine(max_model_len=1000)) as live, open_tab(tmp_path) as tab:
        tab.open(f"{live.url}/")
        tab.wait_for("document.getElementById('model').textContent")
        choose(tab, temperature="-1")
        tab.evaluate("$('input').focus()")
        tab.type("Hi")
        tab.press("Enter")
        tab.wait_for("document.querySelector('.error')")
        assert "temperature" in last(tab, ".error")
        choose(tab, temperature="", max_tokens="many")
        tab.type("Hi")
        tab.press("Enter")
        tab.wait_for("document.querySelectorAll('.error').length === 2")
        assert last(tab, ".error") == "max_tokens: got many, allowed is a number"


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    with running(FakeEngine(), api_key=("secret",)) as live, open_tab(tmp_path) as tab:
        tab.open(f"{live.url}/")
        tab.wait_for("!$('notice').hidden")
        assert "API key" in tab.evaluate("$('notice').textContent")
        assert tab.evaluate("document.activeElement.id") == "key"
        choose(tab, key="secret")
        tab.wait_for("$('model').textContent === 'demo' && $('notice').hidden")
        say(tab, "Hi")
        assert last(tab, "article.assistant p:not([class])") == "".join(WORDS)
        command = tab.evaluate("curlCommand()")
        assert "$FD_DSA_API_KEY" in command
        assert "secret" not in command
        stored = "JSON.stringify(localStorage)"
        assert "secret" not in tab.evaluate(stored)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_copied_command_asks_the_same(tmp_path: Path) -> None:
    with page(tmp_path) as (tab, live):
        choose(tab, seed="7", max_tokens="3")
        say(tab, 'It\'s "quoted" $HOME `x` ü')
        prompt, params = sent(live)
        command = tab.evaluate("curlCommand()")
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
        assert done.stdout.rstrip().endswith("data: [DONE]")
        assert sent(live) == (prompt, params)


def test_a_phone_and_the_dark(tmp_path: Path) -> None:
    with page(tmp_path, FakeEngine(words=["long" * 100, "\n```\n" + "x" * 300]), (500, 700)) as (
        tab,
        _,
    ):
        width = 340
        metrics: dict[str, Any] = {"width": width, "height": 640, "mobile": True}
        tab.call("Emulation.setDeviceMetricsOverride", deviceScaleFactor=2, **metrics)
        say(tab, "Hi")
        tab.evaluate("$('settings-button').click()")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert _background(tab) == "rgb(255, 255, 255)"
        dark: Sequence[dict[str, str]] = [{"name": "prefers-color-scheme", "value": "dark"}]
        tab.call("Emulation.setEmulatedMedia", features=dark)
        assert _background(tab) == "rgb(20, 23, 27)"


def _background(tab: Tab) -> str:
    """The page's background colour."""
    return str(tab.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_the_choice_of_the_indexer_is_drawn(tmp_path: Path) -> None:
    config = EngineConfig(max_model_len=512, max_num_seqs=4, index_topk=16)
    engine = threaded(build_engine(config))
    with running(engine) as live, open_tab(tmp_path) as tab:
        tab.open(f"{live.url}/")
        tab.wait_for("$('model').textContent === 'demo'")
        choose(tab, max_tokens="12")
        tab.evaluate("$('topk').click()")
        say(tab, "The sun is warm and the sea is blue. What is the capital of France?")
        chosen = tab.evaluate("current().messages.at(-1).chosen")
        size = chosen["position"] + 1
        assert size > 16
        # a pixel is coloured exactly where a layer chose a position
        drawn = tab.evaluate(
            "(() => { const c = document.querySelector('canvas'), n = current().messages.at(-1)"
            ".chosen.layers.length; const d = c.getContext('2d').getImageData(0, 0, c.width, "
            "c.height).data; const rows = []; for (let l = 0; l < n; l++) { rows.push([]); "
            "for (let x = 0; x < c.width; x++) if (d[4 * ((l * c.height / n + 3) * c.width + x)"
            " + 3]) rows[l].push(x); } return rows; })()"
        )
        assert drawn == chosen["layers"]
        box = tab.evaluate("document.querySelector('canvas').getBoundingClientRect().toJSON()")
        target, layer = chosen["layers"][1][3], 1
        x = box["x"] + box["width"] * (target + 0.5) / size
        y = box["y"] + box["height"] * (layer + 0.5) / len(chosen["layers"])
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        tab.wait_for("document.querySelector('.caption').textContent.includes('layer 1')")
        caption = last(tab, ".caption")
        assert caption.startswith(f"layer {layer}, position {target} ")
        assert f": chosen; this layer chose 16 of {size}" in caption
        assert len(tab.evaluate("document.querySelector('.heat').textContent")) > 40
        # it is of this tab alone
        assert "layers" not in tab.evaluate("localStorage.getItem('fd_dsa.chats')")
        assert tab.problems == []
