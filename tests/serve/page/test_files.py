"""The page at /: files that go with a message, and the example with a long text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from fd_dsa.config import EngineConfig
from fd_dsa.startup.build import build_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import running
from tests.serve.fake_engine import FakeEngine
from tests.serve.page.conftest import opened, say, sent, serious

QUESTION = "article.user .body"
NEEDLE = "text=Find the number hidden in a long text"
DROP = """(files) => {
  const data = new DataTransfer();
  for (const [name, text] of files) data.items.add(new File([text], name));
  const event = (type) =>
    new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });
  const taken = !document.body.dispatchEvent(event("dragover"));
  document.body.dispatchEvent(event("drop"));
  return taken;
}"""


def chips(page: Page, *expected: str) -> None:
    """The files that wait for the next message become these."""
    expect(page.locator("#files li span")).to_have_text(list(expected))


def test_a_file_goes_with_a_message(browser: Browser, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    content = "Grüße 你好\n```\ncode\n```\n"
    notes.write_text(content, "utf-8")
    block = f"````file: notes.txt\n{content}\n````\n\n"
    with running(FakeEngine(max_model_len=1000)) as live, opened(browser, live) as page:
        page.set_input_files("#attached", notes)
        chips(page, f"notes.txt, {notes.stat().st_size} bytes")
        assert serious(page) == []
        say(page, "Translate it.")
        assert sent(live)[0] == f"user:{block}Translate it.\n>"
        chips(page)
        # folded, also after a reload; the conversation has the name of the question
        for _ in range(2):
            box = page.locator(f"{QUESTION} details.file")
            assert box.get_attribute("open") is None
            assert "notes.txt" in box.locator("summary").inner_text()
            assert box.locator("pre").text_content() == content
            assert page.locator(QUESTION).inner_text().endswith("Translate it.")
            assert page.inner_text("#chats .chat") == "Translate it."
            page.reload()
        # dropped, two at once, of which one is removed; no text is needed
        page.click("#new")
        assert page.evaluate(DROP, [["a.md", "first"], ["b.md", "second"]])
        chips(page, "a.md, 5 bytes", "b.md, 6 bytes")
        page.get_by_label("Remove a.md").click()
        chips(page, "b.md, 6 bytes")
        page.click("#send")
        expect(page.locator("article.assistant .stats")).to_be_visible()
        assert sent(live)[0] == "user:```file: b.md\nsecond\n```\n>"
        assert page.inner_text("#chats [aria-current]") == "b.md"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"x" * 1025, "the file has 1025 bytes; must have at most 1024, 4 for each of the 256 tok"),
        (b"", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", "images and other binary files are not supported"),
        # what a file is counts before its size
        (b"\xff\xd8\xff\xe0\0\x10JFIF" + b"x" * 200_000, "images and other binary files are not"),
        ("Grüße".encode("latin-1") * 200, "the file is not plain text in UTF-8; convert it"),
        # a character across the end of the part that is looked at
        (b"x" * 65535 + "ü".encode(), "the file has 65537 bytes; must have at most 1024"),
        ("Grüße".encode("latin-1"), "the file is not plain text in UTF-8"),
        ("text".encode("utf-16"), "the file is not plain text in UTF-8"),
        (b"plain\0text", "images and other binary files are not supported"),
    ],
)
def test_a_file_that_is_refused(
    browser: Browser, tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    with running(FakeEngine()) as live, opened(browser, live) as page:
        page.fill("#input", "kept")
        page.set_input_files("#attached", path)
        expect(page.locator("#notice-text")).to_contain_text(f"file.bin is not attached: {reason}")
        chips(page)
        assert page.input_value("#input") == "kept"


def test_files_share_the_bound(browser: Browser) -> None:
    with running(FakeEngine()) as live, opened(browser, live) as page:
        page.evaluate(DROP, [["a", "x" * 1000], ["b", "x" * 25], ["c", "x" * 24]])
        refused = "b is not attached: the file has 25 bytes and the files before it 1000"
        expect(page.locator("#notice-text")).to_contain_text(refused)
        chips(page, "a, 1000 bytes", "c, 24 bytes")


def test_a_setting_that_is_wrong_keeps_the_files(browser: Browser) -> None:
    with running(FakeEngine()) as live, opened(browser, live) as page:
        page.evaluate(DROP, [["a", "text"]])
        page.evaluate("document.querySelector('#max_tokens').value = 'many'")
        page.click("#send")
        expect(page.locator("#settings")).to_be_visible()
        chips(page, "a, 4 bytes")
        assert live.engine.requests == {}


def test_the_example_of_a_number_in_a_long_text(browser: Browser) -> None:
    """The demo model answers each text right, and the picture marks the number."""
    engine = threaded(build_engine(EngineConfig(max_model_len=4096, max_num_seqs=4)))
    with running(engine) as live, opened(browser, live) as page:
        numbers = set()
        for pick in range(5):
            page.click("#new")
            # the page draws one of a hundred numbers, which stand for the five texts in turn
            page.evaluate(f"Math.random = () => {pick + 0.5} / 100")
            page.click(NEEDLE)
            # two thousand tokens, on any machine
            expect(page.locator(".found.caption")).to_be_visible(timeout=300_000)
            hidden = re.findall(r"\d{5}", page.locator(f"{QUESTION} pre").text_content() or "")
            assert len(hidden) == 1
            numbers.update(hidden)
            reply = page.inner_text("article.assistant .body")
            assert reply == f"The pass key is {hidden[0]}."
            caption = page.locator(".found.caption")
            expect(caption).to_contain_text(f"{hidden[0]}, at the positions")
            expect(caption).to_contain_text("layer 5 selected 3 of its 5")
        assert len(numbers) == 5
        marked = page.locator(".heat .found")
        assert "".join(marked.all_text_contents()).strip() == hidden[0]
        # the frame is where the picture has these tokens
        canvas, frame = (page.locator(one).bounding_box() for one in ("canvas", ".frame"))
        assert canvas and frame
        first = int(str(marked.first.get_attribute("title")).partition(":")[0])
        size = page.locator(".heat span").count()
        assert 1500 < size < 2500
        assert abs(frame["x"] - canvas["x"] - canvas["width"] * first / size) < 3
        assert page.locator("#topk").is_checked() is False
        assert serious(page) == []


def test_the_example_where_no_picture_can_be_made(browser: Browser) -> None:
    """A device refuses the picture, and the answer comes without it."""
    field = "return_topk_positions"

    def refuse(route: Route) -> None:
        if field in route.request.post_data_json:
            error = {"message": f"{field} is true; use a CPU", "param": field}
            route.fulfill(status=400, json={"error": error})
        else:
            route.continue_()

    engine = FakeEngine(max_model_len=10_000)
    with running(engine) as live, opened(browser, live, fails=True) as page:
        page.route("**/chat/completions", refuse)
        page.click(NEEDLE)
        expect(page.locator(".stats")).to_be_visible()
        assert page.locator(".error").count() == 0
        expect(page.locator("article.assistant > .caption")).to_contain_text("use a CPU")
