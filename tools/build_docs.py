"""Build the documentation as HTML pages in build/docs, and check its links (`make docs`).

Every Markdown file of the repository's top folder and of docs/ becomes a page; pictures are copied.
A link to a file or heading that does not exist ends the build with status 1.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
NAV = ("README.md", "docs/index.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto;
  padding: 0 1rem; }}
pre {{ overflow-x: auto; padding: .8rem; border: 1px solid #8886; border-radius: 6px; }}
code {{ font-size: .92em; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ border: 1px solid #8886; padding: .3rem .6rem; text-align: left; vertical-align: top; }}
img {{ max-width: 100%; }}
nav a {{ margin-right: 1.2rem; }}
</style>
<nav>{nav}</nav>
{body}
"""


@dataclass
class Page:
    """One Markdown file, parsed.

    Attributes:
        path: relative to the root.
        tokens: what markdown-it made of it; headings carry ids, as on GitHub.
        anchors: those ids.
    """

    path: Path
    tokens: list[Token]
    anchors: set[str]


def parser() -> MarkdownIt:
    """Markdown as the pages use it: CommonMark and tables."""
    return MarkdownIt("commonmark").enable("table")


def load_pages(root: Path) -> dict[Path, Page]:
    """All pages below `root` by relative path."""
    files = sorted(root.glob("*.md")) + sorted((root / "docs").rglob("*.md"))
    return {path.relative_to(root): _load(root, path.relative_to(root)) for path in files}


def _load(root: Path, path: Path) -> Page:
    """Parse one page and give its headings ids."""
    tokens = parser().parse((root / path).read_text("utf-8"))
    anchors: set[str] = set()
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", _slug(inline.content))
            anchors.add(_slug(inline.content))
    return Page(path, tokens, anchors)


def _slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def _references(page: Page) -> Iterator[tuple[Token, str]]:
    """Links and pictures of a page that point into the repository: token and attribute."""
    for token in page.tokens:
        for child in token.children or ():
            attribute = {"link_open": "href", "image": "src"}.get(child.type)
            if attribute and not re.match(r"[a-z]+:", str(child.attrGet(attribute))):
                yield child, attribute


def broken_links(root: Path) -> list[str]:
    """Links to files or headings that do not exist, as lines `page: link`."""
    pages = load_pages(root)
    found = []
    for page in pages.values():
        for token, attribute in _references(page):
            link = str(token.attrGet(attribute))
            file, anchor = urldefrag(unquote(link))
            target = (root / page.path.parent / file).resolve() if file else root / page.path
            known = pages.get(target.relative_to(root)) if target.is_relative_to(root) else None
            if not target.exists() or (anchor and (known is None or anchor not in known.anchors)):
                found.append(f"{page.path}: {link}")
    return found


def build(root: Path, out: Path) -> int:
    """Write all pages and pictures below `out`; returns the number of pages."""
    pages = load_pages(root)
    shutil.rmtree(out, ignore_errors=True)
    for page in pages.values():
        for token, attribute in _references(page):
            link = str(token.attrGet(attribute))
            token.attrSet(attribute, re.sub(r"\.md(#|$)", r".html\1", link))
        target = out / page.path.with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        md = parser()
        body = md.renderer.render(page.tokens, md.options, {})
        up = "../" * (len(page.path.parts) - 1)
        nav = "".join(
            f'<a href="{up}{name[:-3]}.html">{Path(name).stem}</a>'
            for name in NAV
            if Path(name) in pages
        )
        target.write_text(PAGE.format(title=page.path.stem, nav=nav, body=body), "utf-8")
    for picture in (root / "docs").rglob("*.svg"):
        copy = out / picture.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, copy)
    return len(pages)


def main() -> int:
    """Check and build; returns the exit status."""
    broken = broken_links(ROOT)
    for line in broken:
        print(f"broken link in {line}", file=sys.stderr)
    if broken:
        return 1
    out = ROOT / "build" / "docs"
    print(f"{build(ROOT, out)} pages in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
