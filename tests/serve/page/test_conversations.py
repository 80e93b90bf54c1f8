"""The page at /: conversations in the browser, in several tabs, as files; failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.serve.conftest import Live, running
from tests.serve.fake_engine import WORDS, FakeEngine
from tests.serve.page.conftest import needs_chromium, open_page, opened, profile, say, sent

TEXT = "".join(WORDS)
ANSWER = "article.assistant .body"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server that every test leaves as it was."""
    with running(FakeEngine(max_model_len=4000)) as live:
        yield live


def titles(page: Page, *expected: str) -> None:
    """The list of conversations becomes this."""
    expect(page.locator("#chats .chat")).to_have_text(list(expected))


def questions(page: Page, *expected: str) -> None:
    """Expect these questions of the user on the page."""
    expect(page.locator("article.user .body")).to_have_text(list(expected))


def test_tabs_add_to_each_other(browser: Browser, live: Live) -> None:
    with profile(browser, live) as context:
        one, two = open_page(context, live), open_page(context, live)
        say(one, "From one")
        titles(two, "From one")
        say(two, "From two")
        titles(one, "From two", "From one")
        # both write to the same conversation
        two.click("text=From one")
        questions(two, "From one")
        say(two, "More from two")
        questions(one, "From one", "More from two")
        say(one, "More from one")
        questions(two, "From one", "More from two", "More from one")
        one.close()
        two.reload()
        titles(two, "From one", "From two")
        two.click("text=From one")
        questions(two, "From one", "More from two", "More from one")
        # deleted elsewhere, it is gone here
        three = open_page(context, live)
        three.click("text=From one")
        three.click("text=Delete")
        titles(two, "From two")
        expect(two.locator("article")).to_have_count(0)


def test_branches_of_two_tabs_are_both_kept(browser: Browser, live: Live) -> None:
    with profile(browser, live) as context:
        one, two = open_page(context, live), open_page(context, live)
        say(one, "Root")
        two.click("text=Root")
        questions(two, "Root")
        for page, text in ((one, "Left"), (two, "Right")):
            page.fill("#input", text)
        one.press("#input", "Enter")
        two.press("#input", "Enter")
        for page in (one, two):
            expect(page.locator("#send")).to_be_visible()
        # whichever was sent first, a search finds all of them in a tab that knows neither
        three = open_page(context, live)
        for text in ("Root", "Left", "Right"):
            three.fill("#search", text)
            titles(three, "Root")


def test_an_answer_of_another_tab_is_shown_while_one_runs_here(browser: Browser) -> None:
    engine = FakeEngine(words=WORDS * 1000, step_s=0.05, max_model_len=10_000)
    with running(engine) as live, profile(browser, live) as context:
        one, two = open_page(context, live), open_page(context, live)
        engine.is_held = True
        one.fill("#input", "Left")
        one.press("#input", "Enter")
        two.click("#chats .chat")
        questions(two, "Left")
        two.fill("#input", "Right")
        two.press("#input", "Enter")
        questions(two, "Left", "Right")
        engine.is_held = False
        expect(one.locator(ANSWER).first).to_contain_text("sparse")
        one.keyboard.press("Escape")
        expect(two.locator(".stats")).to_contain_text("stopped")
        assert two.inner_text(ANSWER) == one.inner_text(ANSWER)
        expect(two.locator("#stop")).to_be_visible()
        two.keyboard.press("Escape")
        expect(two.locator(".stats")).to_have_count(2)


def test_rename_search_delete_and_undo(browser: Browser, live: Live) -> None:
    with opened(browser, live) as page:
        say(page, "About the sea")
        page.click("#new")
        say(page, "About the sun")
        page.click("text=Rename")
        page.fill("#chats input", "Star")
        page.press("#chats input", "Enter")
        titles(page, "Star", "About the sea")
        page.reload()
        # texts of messages are searched too
        page.fill("#search", "the SUN")
        titles(page, "Star")
        page.fill("#search", "nowhere")
        expect(page.locator("#none")).to_have_text("No conversation has this text.")
        page.fill("#search", "")
        page.click("text=Star")
        page.click("text=Delete")
        titles(page, "About the sea")
        page.click("text=Undo")
        titles(page, "Star", "About the sea")
        questions(page, "About the sun")
        page.click("text=Delete")
        titles(page, "About the sea")
        page.reload()
        titles(page, "About the sea")


@needs_chromium
def test_a_phone_shows_the_way_back_over_the_list(browser: Browser, live: Live) -> None:
    with opened(browser, live, viewport={"width": 390, "height": 800}) as page:
        say(page, "About the sea")
        page.click("#menu")
        page.click("text=Delete")
        # a click fails if something lies over the text
        page.locator("#toast span").click(timeout=5000)
        page.click("text=Undo")
        expect(page.locator("article.user")).to_contain_text("About the sea")


def imported(page: Page, *, new: int, extended: int, known: int) -> None:
    """The page tells these numbers of conversations of the last import."""
    counts = f"{new} new, {extended} with new messages, {known} already here."
    expect(page.locator("#toast")).to_contain_text(f"Conversations: {counts}")


@needs_chromium
def test_files_go_out_and_in(browser: Browser, live: Live, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    with opened(browser, live) as page:
        say(page, "Keep me")
        with page.expect_download() as download:
            page.click("#export")
        download.value.save_as(path)
        # what is here already stays once
        page.set_input_files("#file", path)
        imported(page, new=0, extended=0, known=1)
        titles(page, "Keep me")
        exported = json.loads(path.read_text())
        (chat,) = exported["chats"]
        assert [m["content"] for m in chat["messages"]] == ["Keep me", TEXT]
        other = {"id": "other", "title": "Other", "messages": [{"id": "1", "parent": None}]}
        other["messages"][0] |= {"role": "user", "content": "x"}
        # an empty conversation is not shown, so it is not counted
        (tmp_path / "three.json").write_text(
            json.dumps(exported | {"chats": [chat, other, other, {"id": "empty", "messages": []}]})
        )
        page.set_input_files("#file", tmp_path / "three.json")
        imported(page, new=1, extended=0, known=1)
        chat["messages"].append({"id": "2", "parent": None, "role": "user", "content": "more"})
        (tmp_path / "more.json").write_text(json.dumps(exported))
        page.set_input_files("#file", tmp_path / "more.json")
        imported(page, new=0, extended=1, known=0)
        chat["messages"].pop()
        # a deleted conversation that comes back is new
        page.click("text=Keep me")
        page.click("text=Delete")
        page.set_input_files("#file", path)
        imported(page, new=1, extended=0, known=0)
    broken = json.loads(path.read_text())
    broken["chats"].append({"id": "x", "messages": [{"id": "1", "parent": "2", "role": "user"}]})
    with opened(browser, live) as page:
        for content, reason in (
            ("{", "the file is not JSON"),
            ("[]", "the file is no export of this page"),
            (json.dumps(broken), 'chats[1].messages[0].parent: got "2"; must be an earlier'),
        ):
            path.write_text(content)
            page.set_input_files("#file", path)
            expect(page.locator("#notice-text")).to_contain_text(f"Nothing was imported: {reason}")
            titles(page)
        path.write_text(json.dumps(exported))
        page.set_input_files("#file", path)
        titles(page, "Keep me")
        page.reload()
        page.click("text=Keep me")
        expect(page.locator(ANSWER)).to_have_text(TEXT)


def test_answers_again_and_questions_changed(browser: Browser, live: Live) -> None:
    with opened(browser, live) as page:
        say(page, "First")
        say(page, "Second")
        used = page.inner_text("#context")
        page.locator("article.user").first.get_by_text("Edit").click()
        page.fill("article textarea", "Changed")
        page.press("article textarea", "Enter")
        questions(page, "Changed")
        expect(page.locator("#send")).to_be_visible()
        assert sent(live)[0] == "user:Changed\n>"
        page.click("text=Regenerate")
        expect(page.locator("article.assistant .versions")).to_contain_text("2 of 2")
        expect(page.locator("#send")).to_be_visible()
        # nothing is lost: the first version has all that came after it
        # a key needs no place: the page scrolls to the end of the new answer meanwhile
        page.locator("article.user").get_by_label("Earlier version").press("Enter")
        questions(page, "First", "Second")
        expect(page.locator("#context")).to_have_text(used)
        # the page opens again what it showed
        page.reload()
        questions(page, "First", "Second")
        expect(page.locator("#context")).to_have_text(used)
        page.click("#new")
        page.reload()
        titles(page, "First")
        questions(page)


def test_a_failed_answer_is_asked_again(browser: Browser) -> None:
    engine = FakeEngine(max_model_len=1000)
    with running(engine) as live, opened(browser, live) as page:
        engine.nan_after = 2
        say(page, "Hi")
        error = page.locator(".error")
        expect(error).to_be_visible()
        expect(page.locator(ANSWER)).to_have_text("".join(WORDS[:2]))
        engine.nan_after = None
        page.click("text=Retry")
        expect(page.locator(".stats").last).to_contain_text("prompt")
        expect(page.locator(ANSWER)).to_have_text(TEXT)
        assert error.count() == 0
        questions(page, "Hi")


def test_a_prompt_that_is_too_long(browser: Browser) -> None:
    with running(FakeEngine()) as live, opened(browser, live, fails=True) as page:
        say(page, "x" * 300)
        expect(page.locator(".error")).to_contain_text("shorten the prompt or begin a new conv")
        expect(page.locator(".error")).not_to_contain_text("max-model-len")


@needs_chromium
def test_a_server_that_drains_or_dies_and_comes_back(browser: Browser) -> None:
    with (
        running(FakeEngine(max_model_len=1000)) as live,
        opened(browser, live, fails=True) as page,
    ):
        live.state.draining = True
        page.fill("#input", "Wait for me")
        page.press("#input", "Enter")
        expect(page.locator("#trouble")).to_contain_text("The server is shutting down")
        expect(page.locator(".waiting")).to_contain_text("when the server is back")
        page.context.set_offline(True)
        expect(page.locator("#trouble")).to_contain_text("The server does not answer")
        live.state.draining = False
        page.context.set_offline(False)
        # nobody touches anything
        expect(page.locator(ANSWER)).to_have_text(TEXT)
        expect(page.locator("#trouble")).to_be_hidden()
        assert sent(live)[0] == "user:Wait for me\n>"
        # Stop gives up, and the question can be asked again
        page.context.set_offline(True)
        page.fill("#input", "Not now")
        page.press("#input", "Enter")
        expect(page.locator(".waiting")).to_be_visible()
        page.click("#stop")
        expect(page.locator("#send")).to_be_visible()
        page.context.set_offline(False)
        page.locator("article.assistant").last.get_by_text("Regenerate").click()
        expect(page.locator(ANSWER).last).to_have_text(TEXT)


def test_a_connection_that_breaks_keeps_what_came(browser: Browser) -> None:
    engine = FakeEngine(words=WORDS * 100, step_s=0.05, max_model_len=10_000)
    with running(engine) as live, opened(browser, live, fails=True) as page:
        page.fill("#input", "Hi")
        page.press("#input", "Enter")
        expect(page.locator(ANSWER)).to_contain_text("sparse")
        engine.fail_after = 0
        expect(page.locator(".error")).to_be_visible()
        expect(page.locator(".stats")).to_contain_text("output about")
        expect(page.locator("#trouble")).to_contain_text("The server does not answer")
        expect(page.locator("text=Retry")).to_be_visible()
        assert page.inner_text(ANSWER).startswith("Hello wörld")
