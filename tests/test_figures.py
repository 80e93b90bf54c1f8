"""Figures in sentences: the pages show what results and code give, and no measured figure is typed.

tests/data/figures_allowed.txt lists the figures that a page defines: limits of other programs,
sizes of cases, units of flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _figures
from benchmarks._figures import DEFINED, FigureError, figures, value, without_marks
from benchmarks._harness import write_json
from benchmarks._render import fill
from tests.benchmarks.results import case, result

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ALLOWED = ROOT / "tests/data/figures_allowed.txt"
_UNITS = (
    r"ms|us|µs|ns|s|seconds?|minutes?|hours?|tokens/s|tokens a second|[KMGT]i?B|kB|bytes|%"
    r"|times|x|nats|[TPG]?FLOP/s|[TG]B/s|launches|programs|分钟|秒|毫秒|倍"
)
_NUMBER = r"(?<![\w.,^/-])\d[\d,]*(?:\.\d+)?k?"
_MEASURED = re.compile(
    rf"{_NUMBER}(?: (?:to|and|of|or|至) \d[\d,.]*k?)* ?(?:{_UNITS})(?![\w/])"
    r"|\b(?:a|one|two|three|four) (?:thirds?|quarters?|fifths?|tenths?)\b"
)
_NUMERIC_CELL = re.compile(r"(?<=\|) [\d.,/-]+(?: ?%)?(?: [(\[][\d., -]+[)\]])? (?=\|)")
_FRACTION = re.compile(r"\| \d+[./]\d")


def measured(page: str) -> Iterator[str]:
    """Figures with a unit in the prose of a page, and rows of numbers in its tables."""
    text = without_marks(page)
    text = re.sub(r"^```.*?^```|`[^`\n]*`|\]\([^)\s]*\)", "", text, flags=re.M | re.S)
    for line in text.splitlines():
        cells = _NUMERIC_CELL.findall(line) if line.startswith("|") else []
        if len(cells) >= 2 and _FRACTION.search(line):
            yield line
        else:
            yield from (match[0] for match in _MEASURED.finditer(line))


def allowed() -> set[tuple[str, str]]:
    """Page and figure of each line of the list."""
    lines = (line for line in ALLOWED.read_text("utf-8").splitlines() if line[:1] not in ("", "#"))
    return {(page, figure) for page, _, figure in (line.partition(": ") for line in lines)}


def test_no_measured_figure_is_typed() -> None:
    found = {
        (page.relative_to(ROOT).as_posix(), figure)
        for page in PAGES
        for figure in measured(page.read_text("utf-8"))
    }
    typed = sorted(f"{page}: {figure}" for page, figure in found - allowed())
    assert not typed, "\n".join(["make these figures of shown.json, or list them:", *typed])
    unused = allowed() - found
    assert not unused, f"entries that no page needs: {sorted(unused)}"


@pytest.mark.parametrize(
    "text",
    [
        "a step takes 3.5 ms",
        "2.8 to 3.9 times the tokens",
        "about 1,765 launches",
        "10 % of a step",
        "三层共 12 毫秒",
        "three fifths of it",
        "| case | 1.0 | 2.0 (1.0, 3.0) | 40 % |",
    ],
)
def test_typed_figures_are_found(text: str) -> None:
    assert list(measured(text))
    name = next(iter(DEFINED))
    assert not list(measured(f"takes <!-- figure: {name} -->3.5 ms<!-- end --> a step"))
    assert not list(measured(f"set `--limit 5 s`, or\n```\n{text}\n```\n"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_have_the_figures_of_their_sources(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text == _figures.filled(text), "run python -m benchmarks.report"
    # a comment at the start of a line or of a list item makes the line HTML, not Markdown
    assert not re.search(r"^\s*(?:[-*>]|\d+\.)?\s*<!-- figure: ", text, re.MULTILINE)


def test_every_defined_figure_is_on_a_page() -> None:
    shown = {name for page in PAGES for name in figures(page.read_text("utf-8"))}
    assert sorted(DEFINED.keys() - shown) == []


def test_figures_of_a_result(tmp_path: Path) -> None:
    cases = [case(name, {"ours": us}, "ours", rows=n) for name, us, n in (("a", 4, 1), ("b", 5, 2))]
    write_json(tmp_path / "some.json", result("some", cases))
    selected = {"x": ("some", "{cases[case=b&tier=T1][times][ours][p50]:~} us")}
    assert value("x", tmp_path, selected) == "5.00 us"
    assert value("x", tmp_path, {"x": ("some", "{cases[times.ours.p50=4][rows]:.2f}")}) == "1.00"
    text = "takes <!-- figure: x -->3<!-- end --> at most"
    assert figures(text) == {"x": "3"}


def test_figures_of_the_code() -> None:
    defined = {"depth": ("code", "{fd_dsa.serve.body.MAX_DEPTH}"), "n": ("code", "{flags[port]}")}
    assert value("depth", defined=defined) == "64" and value("n", defined=defined) == "8000"
    assert fill("{x[y]}", {"x": lambda: {"y": 3}}) == "3"


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        (None, "figure: got 'x'; must be one of "),
        (("none", "{a}"), "got 'none'; must be one of "),
        (("some", "@no_such"), "figures: x: got 'no_such'; must be one of "),
        (("some", "{casse[0]}"), "figures: x: some {casse[0]}: 'casse'"),
        (("some", "{cases[case=c][ours]}"), "0 items have case=c"),
        (("some", "{cases[tier=T1][ours]}"), "2 items have tier=T1"),
        (("some", "{cases[0][ours]:.2f}"), "figures: x: some {cases[0][ours]:.2f}: "),
        (("code", "{no_fact}"), "'no_fact' is no fact; there are flags, "),
        (("code", "{fd_dsa.serve.body.NO_DEPTH}"), "NO_DEPTH"),
        (("failed", "{cases[0][case]}"), "figures: failed: The correctness tests of this run"),
    ],
)
def test_unknown_names_are_errors(
    tmp_path: Path, definition: tuple[str, str] | None, said: str
) -> None:
    cases = [case(name, {"ours": 4.0}, "ours") for name in "ab"]
    write_json(tmp_path / "some.json", result("some", cases))
    write_json(tmp_path / "failed.json", result("failed", cases, gate="failed"))
    defined: dict[str, Any] = {"x": definition} if definition else {"y": ("some", "{name}")}
    with pytest.raises(FigureError) as error:
        value("x", tmp_path, defined)
    assert said in str(error.value)
