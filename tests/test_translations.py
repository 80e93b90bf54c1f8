"""Pages in two languages agree: X.md and X.zh.md have the same commands, tables and links."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# a figure without a digit is English words, which Chinese writes by itself
_FIGURE = re.compile(
    r"<!-- (?:figure|result): (\w+?)(?:_zh)? -->[^<]*?\d.*?<!-- end -->", re.DOTALL
)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_SPAN = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_LATIN = re.compile(r"[A-Za-z]")


def _chinese_pages() -> list[Path]:
    """Every Chinese page of the tree, new ones that git does not ignore included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.zh.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in sorted(set(listed.stdout.splitlines()))]


def _english(path: Path) -> Path:
    """Return the English page of a Chinese one, and any other file as it is."""
    return path.with_name(path.name.replace(".zh.md", ".md"))


def _row(line: str) -> tuple[str, int, list[str], list[str]]:
    """Return bars, code spans and numbers of a line of a table."""
    plain = _SPAN.sub("", _LINK.sub("]", re.sub(r"<!--.*?-->", "", line)))
    # a month is a word in English
    numbers = re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"\d+ 月", "", plain))
    return "row", plain.count("|"), sorted(_SPAN.findall(line)), sorted(numbers)


def _parts(text: str) -> Iterator[object]:
    """Headings' levels, lines of code without comments, and rows of tables, in their order."""
    in_code = False
    for line in text.splitlines():
        if line.startswith("```"):
            in_code = not in_code
            yield line
        elif in_code:
            code = re.sub(r"(?:^|\s+)#.*$", "", line)
            if code.strip() or not line.strip():
                yield code
        elif line.startswith("#"):
            yield line.split(" ")[0]
        elif line.startswith("|"):
            yield _row(line)


def _sections(text: str) -> list[str]:
    """Return prose and tables below each heading, without code blocks."""
    return re.split(r"^#+ ", _FENCE.sub("", text), flags=re.MULTILINE)


def _slug(heading: str) -> str:
    """Anchor of a heading, as the builder of the site and GitHub make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def _target(page: Path, text: str, link: str) -> str:
    """The English page that a link leads to, and the number of the heading there."""
    if "://" in link:
        return link
    name, _, anchor = link.partition("#")
    path = (page.parent / name).resolve() if name else page
    place = ""
    if anchor:
        there = path.read_text("utf-8") if name else text
        slugs = [_slug(heading) for heading in _HEADING.findall(_FENCE.sub("", there))]
        place = f"#{slugs.index(anchor)}" if anchor in slugs else f"#{anchor} (no such heading)"
    return f"{_english(path).relative_to(ROOT)}{place}"


def _targets(page: Path, text: str, section: str) -> set[str]:
    """Targets of all links of a section."""
    return {_target(page, text, link) for link in _LINK.findall(_SPAN.sub("", section))}


def differences(page: Path, english: str, chinese: str) -> Iterator[str]:
    """Every difference between the two pages that is not one of language.

    Args:
        page: path of the Chinese page.
        english, chinese: texts of both pages.
    """
    other = _english(page)
    for text, line in (
        (english, f"English · [中文]({page.name})"),
        (chinese, f"[English]({other.name}) · 中文"),
    ):
        if text.splitlines()[2:3] != [line]:
            yield f"the third line must be {line}"
    for ours, theirs in zip_longest(_parts(english), _parts(chinese)):
        if ours != theirs:
            # those after it are only shifted
            yield f"{ours} is {theirs} in Chinese"
            break
    for ours, theirs in zip(_sections(english), _sections(chinese), strict=False):
        title = theirs.partition("\n")[0]
        # a Chinese page may explain the English of a block
        if missing := set(_SPAN.findall(ours)) - set(_SPAN.findall(theirs)):
            yield f"{title}: {sorted(missing)} only in English"
        if figures := Counter(_FIGURE.findall(ours)) - Counter(_FIGURE.findall(theirs)):
            yield f"{title}: figures {sorted(figures)} only in English"
        links = _targets(other, english, ours) ^ _targets(page, chinese, theirs)
        if links:
            yield f"{title}: links of one language: {sorted(links)}"
    for link in _LINK.findall(_SPAN.sub("", _FENCE.sub("", chinese))):
        name = link.partition("#")[0]
        if name not in ("", other.name) and not name.endswith(".zh.md") and "://" not in name:
            twin = page.parent / name.replace(".md", ".zh.md")
            if name.endswith(".md") and twin.exists():
                yield f"{link}: there is a Chinese page, {twin.name}"


@pytest.mark.parametrize("page", _chinese_pages(), ids=lambda path: path.stem)
def test_both_languages_agree(page: Path) -> None:
    assert _english(page).exists(), f"{page.name} has no English page"
    texts = (path.read_text("utf-8") for path in (_english(page), page))
    assert list(differences(page, *texts)) == []


ENGLISH = """# Title

English · [中文](page.zh.md)

Use `--port` ([flags](flags.md#server), [below](#more)): <!-- figure: n -->3<!-- end --> times.

```sh
fd-dsa serve -tp 4  # four GPUs
```

## More

| flag | default |
|---|---|
| `--host` | 127, June 2026 |
| [FastDeploy](fastdeploy.md#steps) | `none` |
"""
CHINESE = """# 标题

[English](page.md) · 中文

使用 `--port`，见[参数](flags.md#server)和[下文](#更多)，<!-- figure: n -->3<!-- end --> 次。

```sh
fd-dsa serve -tp 4  # 四张 GPU
```

## 更多

| 参数 | 默认值 |
|---|---|
| `--host` | 127，2026 年 6 月 |
| [接入](fastdeploy.zh.md#步骤) | `none` |
"""


def test_languages_may_differ_in_words() -> None:
    assert list(differences(ROOT / "docs/page.zh.md", ENGLISH, CHINESE)) == []


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ("(page.md)", "(other.md)"),
        ("`--port`", "`--prot`"),
        ("flags.md#server", "flags.md#model"),
        ("flags.md#server", "flags.md#no-such-section"),
        ("#更多)", "#标题)"),
        ("figure: n", "figure: m"),
        ("-tp 4 ", "-tp 8 "),
        ("fd-dsa serve -tp 4  # 四张 GPU\n", ""),
        ("## 更多", "### 更多"),
        ("| `--host` | 127，2026 年 6 月 |\n", ""),
        ("`--host`", "`--hots`"),
        ("127", "128"),
        ("| `none` |", "| `none` | |"),
        ("fastdeploy.zh.md#步骤", "fastdeploy.zh.md#内存"),
        ("fastdeploy.zh.md#步骤", "fastdeploy.md#steps"),
    ],
)
def test_differences_are_found(found: str, wrong: str) -> None:
    assert found in CHINESE
    changed = CHINESE.replace(found, wrong, 1)
    assert list(differences(ROOT / "docs/page.zh.md", ENGLISH, changed))


def _glossary() -> list[tuple[str, str]]:
    """English and Chinese words of each term of docs/glossary.md."""
    text = (ROOT / "docs/glossary.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    terms = [row for row in rows if len(row) == 3 and row[0] not in ("term", "---")]
    assert all(all(row) for row in terms) and len(terms) > 50
    return [(row[0], row[1]) for row in terms]


def test_a_term_is_in_the_glossary_once() -> None:
    for words in zip(*_glossary(), strict=True):
        assert [word for word, count in Counter(words).items() if count > 1] == []


def test_chinese_pages_use_the_chinese_terms() -> None:
    # terms whose Chinese column has the English word too may be used as they are
    english = [term for term, chinese in _glossary() if not _LATIN.search(chinese)]
    assert len(english) > 30
    pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, english))})s?(?![\w-])")
    for page in _chinese_pages():
        text = re.sub(r"<!--.*?-->", "", _FENCE.sub("", page.read_text("utf-8")))
        prose = _LINK.sub("]", _SPAN.sub("", text))
        assert pattern.findall(prose) == [], page.name
