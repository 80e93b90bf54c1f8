"""Fill the tables, plots and figures of the pages from benchmarks/results/*.json and the code.

    python -m benchmarks.report     # rewrites the pages between their marks, and the plots

The pages are prose by hand, with marked regions and marked figures. A region shows a result, as
shown.json describes it, a table of docs/performance.md (`_ratios`), or a plan or log of the code
(`_facts`). A figure is a number in a sentence (`_figures`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import _computed, _figures, _notes, _ratios, _render, _v4_shown
from benchmarks._facts import REGIONS
from benchmarks._harness import RESULTS, ROOT, parser_of
from benchmarks._ratios import SHOWN
from benchmarks._render import FUNCTIONS, paragraphs, refusal

FUNCTIONS.update(vars(_render) | vars(_notes) | vars(_ratios) | vars(_v4_shown) | vars(_computed))
DOCS = ROOT / "docs"
IMAGES = DOCS / "img"
_REGION = re.compile(r"<!-- result: (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def pages() -> list[Path]:
    """Return the pages with regions or figures."""
    texts = [*sorted(ROOT.glob("README*.md")), *sorted(DOCS.rglob("*.md"))]
    return [page for page in texts if re.search(r"<!-- (result|figure): ", page.read_text("utf-8"))]


def region(name: str, folder: Path = RESULTS) -> str:
    """Return the text between the marks of a result or an overview.

    Args:
        name: name of an overview, or of the result's file without its ending.
        folder: folder of the results.
    """
    if name in REGIONS:
        return REGIONS[name]()
    if name in _ratios.TABLES:
        return _ratios.region(name, folder)
    if name == "under_load":
        return "\n".join(under_load(folder))
    path = next(folder.rglob(f"{name}.json"), None)
    if path is None:
        return "Not measured yet.\n"
    result = json.loads(path.read_text())
    parts = SHOWN["results"].get(name, ["@times"])
    if isinstance(parts, str):
        parts = SHOWN["results"][parts]
    return (refusal(result) or "\n\n".join(paragraphs(result, parts))) + "\n"


def under_load(folder: Path) -> Iterator[str]:
    """Yield the pictures of the loads that were measured with both engines."""
    drawn = {path.stem for path, _ in plots(folder)}
    for name, gpus in _ratios.LOADS.items():
        if name in drawn:
            yield f"Requests that arrive at random, on {gpus} ([tables](results/load.md)):\n"
            yield f"![Latencies of vLLM relative to fd_dsa under load, {gpus}](img/{name}.svg)\n"


def plots(folder: Path = RESULTS) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every plot of the pages: its file and its contents."""
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if path.stem not in _ratios.PICTURED or refusal(result):
            continue
        # a load may have been measured for one side only
        if groups := _ratios.drawn(path.stem, result):
            yield IMAGES / f"{path.stem}.svg", {"groups": groups}


def regions(page: str) -> dict[str, str]:
    """Name of each marked region of a page -> its text."""
    return dict(_REGION.findall(page))


def filled(page: str, folder: Path = RESULTS) -> str:
    """Return the page with every region and figure filled."""
    page = _REGION.sub(
        lambda m: f"<!-- result: {m[1]} -->\n{region(m[1], folder)}<!-- end -->\n", page
    )
    return _figures.filled(page, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the pages and, if matplotlib is installed, the plots. Returns 0."""
    parser_of(__doc__).parse_args(argv)
    for page in pages():
        text = page.read_text("utf-8")
        page.write_text(filled(text), "utf-8")
        names = [*regions(text), f"{len(_figures.figures(text))} figures"]
        print(f"{page.relative_to(ROOT)}: {', '.join(names)}")
    if find_spec("matplotlib") is None:
        print("plots left as they are: matplotlib is not installed (extra `dev`)")
        return 0
    from benchmarks.plots import picture

    for path, result in plots():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(picture(result), "utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
