"""Make the tables and plots of docs/performance.md and docs/results from benchmarks/results/*.json.

    python -m benchmarks.report     # rewrites the pages between their marks, and the plots

The pages are prose by hand and marked regions: one for each result in docs/results, a function of
its JSON file as shown.json describes it, and the tables of docs/performance.md (`_ratios`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import _notes, _ratios, _render, _v4_shown
from benchmarks._harness import RESULTS, ROOT
from benchmarks._ratios import SHOWN
from benchmarks._render import Column, Part, Result, Table, load, paragraphs, refusal, rows_at

_FUNCTIONS = vars(_render) | vars(_notes) | vars(_ratios) | vars(_v4_shown)
DOCS = ROOT / "docs"
IMAGES = DOCS / "img"
_REGION = re.compile(r"<!-- result: (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def pages() -> list[Path]:
    """The pages with regions."""
    concepts = DOCS / "concepts" / "fp8-cache.md"
    return [DOCS / "performance.md", concepts, *sorted((DOCS / "results").glob("*.md"))]


def region(name: str, folder: Path = RESULTS) -> str:
    """The text between the marks of a result or an overview.

    Args:
        name: name of an overview, or of the result's file without its ending.
        folder: where the results are.
    """
    if name in _ratios.TABLES:
        return _ratios.region(name, folder)
    path = next(folder.rglob(f"{name}.json"), None)
    if path is None:
        return "Not measured yet.\n"
    result = load(path)
    refused = refusal(result)
    return f"{refused}\n" if refused else markdown(name, result)


def markdown(name: str, result: Result) -> str:
    """A result as shown.json describes it."""
    parts = map(part, SHOWN["results"].get(name, ["@times"]))
    return "\n\n".join(paragraphs(result, parts)) + "\n"


def part(shown: str | list[Any] | dict[str, Any]) -> Part:
    """A part of shown.json for the renderer."""
    if isinstance(shown, dict):
        return Table(shown["rows"], lambda result: list(_columns(shown["columns"], result)))
    if isinstance(shown, list):
        pieces = [part(piece) for piece in shown]
        return lambda result: ["".join(paragraphs(result, pieces))]
    return _FUNCTIONS[shown[1:]] if shown.startswith("@") else shown


def _columns(shown: Iterable[Any], result: Result) -> Iterator[Column]:
    """The columns of a table, those made for every name among them."""
    for column in shown:
        if isinstance(column, str):
            yield from _FUNCTIONS[column[1:]](result)
        elif isinstance(column, dict):
            for row in rows_at(result, f"{column['each']}.*"):
                for head, cell in column["columns"]:
                    yield head.replace("$", row["key"]), cell.replace("$", row["key"])
        else:
            head, cell = column
            yield head, _FUNCTIONS[cell[1:]] if cell.startswith("@") else cell


def plots(folder: Path = RESULTS) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every plot of the pages: its file and what it shows."""
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if refusal(result):
            continue
        if "timeline" in result:
            yield IMAGES / f"{path.stem}.svg", result
        if path.stem in _ratios.PICTURED and result["cases"]:
            yield IMAGES / f"{path.stem}.svg", {"groups": _ratios.drawn(path.stem, result)}


def regions(page: str) -> dict[str, str]:
    """Name of each marked region of a page -> its text."""
    return dict(_REGION.findall(page))


def filled(page: str, folder: Path = RESULTS) -> str:
    """The page with every region written again."""
    return _REGION.sub(
        lambda m: f"<!-- result: {m[1]} -->\n{region(m[1], folder)}<!-- end -->\n", page
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the pages and, where matplotlib is installed, the plots; returns 0."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args(argv)
    for page in pages():
        text = page.read_text("utf-8")
        page.write_text(filled(text), "utf-8")
        print(f"{page.relative_to(ROOT)}: {', '.join(regions(text))}")
    if find_spec("matplotlib") is None:
        print("plots left as they are: matplotlib is not installed (extra `bench`)")
        return 0
    from benchmarks.plots import picture

    for path, result in plots():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(picture(result), "utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
