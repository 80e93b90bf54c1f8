"""The page at /: formulas, JSON, answers that repeat themselves, answers written again."""

from __future__ import annotations

from playwright.sync_api import Browser, Page, expect

from fd_dsa.chat.template import ChatTemplate
from tests.serve.conftest import running, wait_until
from tests.serve.fake_engine import WORDS, FakeEngine
from tests.serve.page.conftest import choose, opened, say, sent, serious

ANSWER = "article.assistant .body"
# text of an answer, number of formulas in it, texts that stay as they are
FORMULAS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    (r"So \(x^2\) and *then \(a*b\)*.", 2, ("So ", " and ")),
    ("Hence\n\\[\na\n=\n- b\n\\]\nholds.", 1, ("Hence", "holds.")),
    ("$$\\int_0^1 x\\,dx$$", 1, ()),
    (r"$x_1$, $2x + 1$, $10^{-3}$, 设$y$为 $0 < z < 1$", 5, ("设",)),
    ("- item\n  \\[\n  x\n  + y\n  \\]\n- two", 1, ("item", "two")),
    ("> $$\n> a\n> + b\n> $$", 1, ()),
    ("| a |\n|---|\n| \\(x\\) |", 1, ("a",)),
    (r"$\boxed{42}$ and $\begin{pmatrix}1&2\\3&4\end{pmatrix}$", 2, (" and ",)),
    # KaTeX writes styles of these as attributes
    (r"$\pmb{v}$, $\fcolorbox{red}{white}{w}$, $\vec{x}$", 3, ()),
    (r"It costs $5 and $10, or $5-10$, $5 or 10$, US$5$.", 0, ("$5 and $10", "$5 or 10$")),
    (r"`\(x\)` and `$x$`", 0, (r"\(x\)", "$x$")),
    ("```\n\\[x\\]\n```\n\n    $$y$$", 0, (r"\[x\]", "$$y$$")),
    (r"echo $HOME:$PATH, $a and $b, \$5 and \$6", 0, ("$HOME:$PATH", "$5 and $6")),
    (r"\\(x\\) and \[ \]", 0, (r"\(x\)",)),
    # wrong, or not whole: the source
    (r"\(\frac{1}\)", 0, (r"\(\frac{1}\)",)),
    (r"Cut \(x + *y*", 0, (r"Cut \(x + *y*",)),
    ("Cut\n\\[\nx\n\n- y", 0, ("\\[\nx\n\n- y",)),
)
HOSTILE = (
    r"\href{javascript:window.hacked=1}{x}",
    r"\url{https://example.org}",
    r"\includegraphics{https://example.org/x.png}",
    r"\htmlClass{x}{y}",
    r"\htmlStyle{position:fixed}{y}",
    r"\htmlData{a=b}{y}",
    r"\def\a{\a\a}\a",
    r"\def\a#1{#1#1}\a{\a{\a{\a{\a{\a{\a{\a{\a{\a{x}}}}}}}}}}",
    r"\def\a{" + "x" * 900 + "}" + r"\a" * 30,
    r"\edef\a{xx}" + r"\edef\a{\a\a\a\a}" * 20 + r"\a",
    "{" * 2000 + "x" + "}" * 2000,
    r"\sqrt{" * 600 + "x" + "}" * 600,
    r"\color{red}" * 500 + "x",
    r"\begin{matrix}" + r"\frac{1}{2}&" * 600 + r"\end{matrix}",
    "x" * 9000,
)
# Renders text by the module of the page, and says what came of it.
RENDER = """async (texts) => {
  const { markdown } = await import("/static/markdown.js");
  return texts.map((text) => {
    const box = document.createElement("div");
    document.querySelector("#log").replaceChildren(box);
    box.append(markdown(text));
    const formulas = box.querySelectorAll(".katex").length;
    box.querySelectorAll(".katex").forEach((node) => node.remove());
    const tags = [...box.querySelectorAll("a, em, h1, h2, img, li")].map((node) => node.tagName);
    return { formulas, tags, text: box.textContent };
  });
}"""


def rendered(page: Page, *texts: str) -> list[dict[str, object]]:
    """Number of formulas, some tags, and the text outside of formulas."""
    return list(page.evaluate(RENDER, list(texts)))


def test_formulas_of_an_answer(browser: Browser) -> None:
    engine = FakeEngine(max_model_len=10_000)
    with running(engine) as live, opened(browser, live) as page:
        for text, count, shown in FORMULAS:
            page.click("#new")
            engine.words = (text,)
            say(page, "Hi")
            body = page.locator(ANSWER)
            assert body.locator(".katex").count() == count, text
            found = body.text_content() or ""
            assert all(part in found for part in shown), (text, found)
            # neither a list nor a heading out of a part of a formula
            tags = ("li", "h1", "h2", "h3", "hr")
            assert body.locator(".formula").locator(f":is({', '.join(tags)})").count() == 0
        # fonts come from the server too
        page.click("#new")
        engine.words = (FORMULAS[1][0],)
        say(page, "Hi")
        assert page.evaluate("document.fonts.ready.then((all) => all.check('16px KaTeX_Main'))")
        assert serious(page) == []


def test_a_formula_arrives_in_pieces(browser: Browser) -> None:
    texts = (
        (r"Is *it* \(a*b\) or \(c*d\)? Then \[x_1*y_1\] holds, $a_1*b_1$ too.", 4),
        ("First\n\n\\[\n- a\n+ b\n\n= *c*\n\\]\n\nThen $$x$$ and\n$$\n1. y\n$$\nend", 3),
    )
    with running(FakeEngine()) as live, opened(browser, live) as page:
        for text, count in texts:
            pieces = rendered(page, *(text[:end] for end in range(len(text) + 1)))
            counts = [piece["formulas"] for piece in pieces]
            # once drawn it stays, and no half of it is taken for Markdown
            assert counts == sorted(counts), text
            assert counts[-1] == count, text
            allowed = {"EM"} if "*it*" in text else set()
            assert {tag for piece in pieces for tag in piece["tags"]} <= allowed, text


def test_hostile_formulas_are_bounded(browser: Browser) -> None:
    with running(FakeEngine()) as live, opened(browser, live) as page:
        # playwright's time limit ends a page that hangs
        for tex in HOSTILE:
            (found,) = rendered(page, f"\\({tex}\\)")
            assert found["tags"] == []
            assert found["formulas"] or tex[:100] in str(found["text"]), tex[:100]
        for tex in HOSTILE[:7]:
            (found,) = rendered(page, f"\\({tex}\\)")
            assert found == {"formulas": 0, "tags": [], "text": f"\\({tex}\\)\n"}
        assert page.evaluate("typeof window.hacked") == "undefined"
        # no formula lies over the rest of the page
        page.evaluate(RENDER, ["x"])
        engine = live.engine
        engine.words = (r"\(\hspace{-9999em}\rule[9999em]{9999em}{9999em}\kern-9999em x\)",)
        engine.max_model_len = 10_000
        page.click("#new")
        say(page, "Hi")
        page.click("#settings-button")
        expect(page.locator("#settings")).to_be_visible()


def test_an_answer_that_is_json(browser: Browser) -> None:
    # numbers and keys that parsing would change
    text = '{"a": 1e400, "b": 12345678901234567890, "a": "*x* _y_ \\u00e9"}'
    engine = FakeEngine(words=[text[:9], text[9:]], max_model_len=1000)
    options = {"permissions": ["clipboard-read", "clipboard-write"]}
    with running(engine) as live, opened(browser, live, **options) as page:
        say(page, "Hi")
        block = page.locator(f"{ANSWER} .code.json")
        assert block.locator("pre").text_content() == text
        assert block.locator(".hljs-number").count() == 2
        for button in (block.locator("button"), page.locator("article.assistant .actions button")):
            button.first.click()
            expect(button.first).to_have_text("Copied")
            assert page.evaluate("navigator.clipboard.readText()") == text
        # by a form, from its first piece on, and if it was cut
        choose(page, schema='{"type": "object"}')
        engine.words = ('{"a": [1, ',)
        say(page, "Hi")
        assert page.locator(".code.json pre").last.text_content() == '{"a": [1, '
        # a text that only begins so
        choose(page, schema="")
        engine.words = ("[note] *see* {x}",)
        say(page, "Hi")
        assert page.locator(ANSWER).last.inner_text() == "[note] see {x}"


CONTINUED = ChatTemplate(
    "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}",
    {},
    "a script",
)


def test_an_answer_that_repeats_itself_is_ended(browser: Browser) -> None:
    words = ["remove", *["l"] * 3000]
    engine = FakeEngine(words=words, step_s=0.001, max_model_len=20_000, renderer=CONTINUED)
    with running(engine) as live, opened(browser, live) as page:
        say(page, "Hi")
        wait_until(lambda: len(engine.closed) == 1)
        text = page.inner_text(ANSWER)
        assert "".join(words).startswith(text)
        assert len(text) < 2000
        expect(page.locator(".stats")).to_contain_text("ended: it repeated itself · output about")
        expect(page.locator(".note")).to_contain_text("over and over")
        # the reader may want it: the same answer continues, and is not ended again
        with page.expect_request("**/chat/completions") as request:
            page.get_by_role("button", name="Go on").click()
        body = request.value.post_data_json
        assert body["continue_final_message"] is True
        assert body["messages"][-1]["content"] == text
        expect(page.locator(".note")).to_have_count(0)
        expect(page.locator(".stats")).to_contain_text(f"output {len(words)}")
        assert page.inner_text(ANSWER) == text + "".join(words)
        # a text of which much is alike is none
        rows = "".join(f"| {i} | yes | no | yes | no |\n" for i in range(200))
        engine.words = ("| a | b | c | d | e |\n|---|---|---|---|---|\n", *rows.splitlines(True))
        page.click("#new")
        say(page, "Hi")
        expect(page.locator(".stats")).to_contain_text(f"output {len(engine.words)}")


def test_an_answer_is_written_again_with_another_seed(browser: Browser) -> None:
    with running(FakeEngine(max_model_len=1000)) as live, opened(browser, live) as page:
        choose(page, seed="7", temperature="0.5")
        say(page, "Hi")
        for seed in (8, 9):
            page.click("text=Regenerate")
            expect(page.locator(".stats")).to_contain_text(f"seed {seed}")
            expect(page.locator("#send")).to_be_visible()
            assert sent(live)[1].seed == seed


def test_an_answer_that_would_be_the_same(browser: Browser) -> None:
    engine = FakeEngine(max_model_len=1000)
    # what the folder of the model proposes
    engine.sampling_defaults = {"temperature": 0.0}
    with running(engine) as live, opened(browser, live) as page:
        say(page, "Hi")
        page.click("text=Regenerate")
        expect(page.locator("#toast")).to_contain_text("The temperature is 0")
        assert len(engine.requests) == 1
        # in another conversation the offer would ask out of sight
        page.click("#new")
        expect(page.locator("#toast")).to_be_empty()
        page.click("#chats .chat")
        page.click("text=Regenerate")
        offer = page.get_by_role("button", name="Regenerate at temperature 0.8")
        page.set_viewport_size({"width": 390, "height": 800})
        # on a phone the text has the width of its words, and the button is whole
        assert page.locator("#toast span").bounding_box()["width"] > 200
        assert 0 <= offer.bounding_box()["x"] <= 390 - offer.bounding_box()["width"]
        page.set_viewport_size({"width": 1280, "height": 800})
        offer.click()
        expect(page.locator(".versions")).to_contain_text("2 of 2")
        expect(page.locator("#send")).to_be_visible()
        assert sent(live)[1].temperature == 0.8
        # other settings can give another answer
        choose(page, system="Be brief.")
        page.click("text=Regenerate")
        expect(page.locator(".versions")).to_contain_text("3 of 3")
        expect(page.locator("#send")).to_be_visible()
        # after a reload the page knows no request: it asks, and says why it is the same
        page.reload()
        page.click("text=Regenerate")
        expect(page.locator(".versions")).to_contain_text("4 of 4")
        expect(page.locator("#toast")).to_contain_text("The temperature is 0")
        assert page.inner_text(ANSWER) == "".join(WORDS)
