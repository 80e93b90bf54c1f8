"""Texts of the page: each is in strings.js, in both languages, and is used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import fd_dsa.serve

STATIC = Path(fd_dsa.serve.__file__).parent / "static"
# the page for the API is Swagger UI, in English
SCRIPTS = sorted(path for path in STATIC.glob("*.js") if path.name not in ("strings.js", "docs.js"))
HTML = (STATIC / "index.html").read_text("utf-8")
HAN = re.compile(r"[\u4e00-\u9fff]")
# names that are the same in every language
NAMES = {"API", "English", "Top-p", "Top-k", "Min-p"}
# literals with a capital letter or a space that no reader sees: names of the platform, selectors,
# media queries, parts of commands
UNSEEN = {
    "AbortError",
    "BroadcastChannel",
    "Files",
    '<span class="formula f"></span>',
    "Content-Type",
    "Enter",
    "Escape",
    "Bearer ",
    ' -H "Authorization: Bearer $FD_DSA_API_KEY"',
    r"curl -N  -H 'Content-Type: application/json' \\\n  -d ",
    "#settings details",
    "input, select, textarea",
    "article textarea",
    "noopener noreferrer",
    "(pointer: fine)",
    "(any-hover: hover)",
    "(prefers-color-scheme: dark)",
}
LITERAL = re.compile(
    r"(?P<skipped>//[^\n]*|/\*.*?\*/)"
    r"|\"(?P<double>(?:[^\"\\\n]|\\.)*)\"|'(?P<single>(?:[^'\\\n]|\\.)*)'"
    r"|`(?P<template>(?:[^`\\]|\\.)*)`",
    re.DOTALL,
)
FILLED = re.compile(r"\$\{((?:[^{}]|\{[^{}]*\})*)\}")
PROSE = re.compile(r"^\W*[A-Z][a-z]|[A-Za-z]{2,}[,;:.]? [A-Za-z]{2,}|[\u4e00-\u9fff]")
# places whose texts are visible, so that a single word counts too
VISIBLE = re.compile(
    r"(?:\bbutton\(|\bnotice\(|\btoast\(|Error\(|\.(?:textContent|placeholder|title|ariaLabel) = "
    r'|"aria-label", |make\("\w+", "[\w -]*", )'
    r"(?P<quote>[\"'`])(?P<text>.*?)(?P=quote)"
)


def texts() -> dict[str, list[str]]:
    """English and Chinese text by key."""
    source = (STATIC / "strings.js").read_text("utf-8")
    entries = re.findall(r"^  (\w+): \[(.*?),?\s*\],$", source, re.MULTILINE | re.DOTALL)
    assert len(entries) == len(dict(entries))
    assert len(entries) == source.count("],\n")
    return {key: json.loads(f"[{pair}]") for key, pair in entries}


def literals(source: str) -> Iterator[str]:
    """Values of the string literals of a script, with templates unfilled."""
    for match in LITERAL.finditer(source):
        template = match["template"]
        if template is not None:
            for inner in FILLED.findall(template):
                yield from literals(inner)
            yield FILLED.sub("", template)
        elif match["skipped"] is None:
            yield match["double"] if match["double"] is not None else match["single"]


class Seen(HTMLParser):
    """Texts of an HTML file that a reader sees or hears, and the keys that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.keys: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("aria-label", "placeholder", "title", "alt", "label"):
                self.texts.append(value or "")
            if name in ("data-text", "data-label", "data-placeholder"):
                self.keys.append(value or "")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def test_every_text_has_both_languages() -> None:
    for key, pair in texts().items():
        english, chinese = pair
        assert english and chinese, key
        holes = [sorted(re.findall(r"\{\w+\}", text)) for text in pair]
        assert holes[0] == holes[1], key
        assert HAN.search(chinese) or english == chinese in NAMES, (key, chinese)
        assert key in ("language", "chinese") or not HAN.search(english), (key, english)


def test_every_text_is_used_and_every_key_is_known() -> None:
    seen = Seen()
    seen.feed(HTML)
    named = [key for path in SCRIPTS for key in literals(path.read_text("utf-8"))]
    known = texts().keys()
    assert known <= {*seen.keys, *named}
    asked = re.findall(r'\bt\("(\w+)"', "".join(path.read_text("utf-8") for path in SCRIPTS))
    assert {*seen.keys, *asked} <= known


def test_no_text_is_anywhere_else() -> None:
    seen = Seen()
    seen.feed(HTML)
    assert set(seen.texts) == {"fd_dsa"}
    for path in SCRIPTS:
        source = path.read_text("utf-8")
        prose = {text for text in literals(source) if PROSE.search(text)}
        assert prose <= UNSEEN, path.name
        visible = [FILLED.sub("", match["text"]) for match in VISIBLE.finditer(source)]
        assert not [text for text in visible if re.search(r"[^\W\d_]", text)], path.name


def test_the_search_for_texts_finds_them() -> None:
    """Source text with one visible text each, which must be found."""
    for source in ('notice("Gone.")', "x = `${n} of them`", "y = 'two words'", 'z = "没有"'):
        assert any(PROSE.search(text) for text in literals(source)), source
    for source in ('button("ok", f)', 'make("p", "", `done ${n}`)', 'node.title = "all"'):
        assert VISIBLE.search(source), source
