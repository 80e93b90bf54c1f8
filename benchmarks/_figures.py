"""Figures in sentences: the pages mark them, results and the code give them.

    takes <!-- figure: start_disk -->1.9<!-- end --> GB on disk

"figures" of shown.json lists them by source: a result's file without its ending, or `code`, the
facts of `_facts`. A figure is a template over its source (`_render.fill`), or "@NAME", a function
of the source in `_computed`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks._computed import FUNCTIONS
from benchmarks._facts import FACTS
from benchmarks._harness import RESULTS
from benchmarks._ratios import SHOWN
from benchmarks._render import fill, refusal

DEFINED: dict[str, tuple[str, str]] = {
    name: (source, text)
    for source, figures in SHOWN["figures"].items()
    for name, text in figures.items()
}
"""Name of a figure -> its source and its template or function."""
_FIGURE = re.compile(r"<!-- figure: ([^>]*?) -->(.*?)<!-- end -->", re.DOTALL)


class FigureError(ValueError):
    """A figure of a page, or its definition in shown.json, is wrong."""


def _one_of(found: str, allowed: Mapping[str, Any]) -> str:
    """Return the end of an error about a name: the name, and the nearest known ones."""
    near = difflib.get_close_matches(found, allowed, n=3) or [*sorted(allowed)[:5], "..."]
    return f"got {found!r}; must be one of {', '.join(near)}"


@cache
def _source(name: str, folder: Path) -> Mapping[str, Any]:
    """Return the result of a name, or the facts of the code."""
    if name == "code":
        return FACTS
    paths = {path.stem: path for path in folder.rglob("*.json")}
    if name not in paths:
        raise FigureError(f"shown.json: figures: {_one_of(name, paths | {'code': FACTS})}")
    result: Mapping[str, Any] = json.loads(paths[name].read_text("utf-8"))
    refused = refusal(result)
    if refused:
        raise FigureError(f"shown.json: figures: {name}: {refused}")
    return result


def value(name: str, folder: Path = RESULTS, defined: Mapping[str, Any] | None = None) -> str:
    """Return the text of a figure.

    Args:
        name: its name in shown.json.
        folder: the folder of the results.
        defined: other definitions than those of shown.json.

    Raises:
        FigureError: the name, the source, or a key of its path is unknown.
    """
    defined = DEFINED if defined is None else defined
    if name not in defined:
        raise FigureError(f"figure: {_one_of(name, defined)}; shown.json defines them")
    source, text = defined[name]
    found = _source(source, folder)
    if text.startswith("@"):
        if text[1:] not in FUNCTIONS:
            raise FigureError(f"shown.json: figures: {name}: {_one_of(text[1:], FUNCTIONS)}")
        return FUNCTIONS[text[1:]](found)
    try:
        return fill(text, found)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise FigureError(f"shown.json: figures: {name}: {source} {text}: {error}") from error


def figures(page: str) -> dict[str, str]:
    """Name of each figure of a page -> its text."""
    return dict(_FIGURE.findall(page))


def filled(page: str, folder: Path = RESULTS) -> str:
    """Return the page with every figure filled."""
    return _FIGURE.sub(lambda m: f"<!-- figure: {m[1]} -->{value(m[1], folder)}<!-- end -->", page)


def without_marks(page: str) -> str:
    """Return the page without its figures and results."""
    page = _FIGURE.sub("", page)
    return re.sub(r"<!-- result: \w+ -->\n.*?<!-- end -->\n", "", page, flags=re.DOTALL)
