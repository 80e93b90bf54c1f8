"""Tables of results with lines and columns by two properties of the cases."""

from __future__ import annotations

from pathlib import Path

from benchmarks import _notes
from benchmarks._render import Grid, paragraphs
from tests.benchmarks.results import case, result, shown

CASES = [
    case("1 x 4k", {"ours": 2.0, "a": 5.0, "b": 3.0, "other": 1.0}, "ours"),
    case("1 x 8k", {"ours": 4.0, "a": 2.0}, "ours"),
    case("8 x 8k", {"ours": 5.0}, "ours"),
    case("8 x 8k, warm", {"ours": 9.0, "a": 9.0}, "ours"),
]
GRID = {
    "grid": "cases",
    "match": r"(?P<rows>\d+) x (?P<keys>\d+k)",
    "peers": ["a", "b"],
    "by": ["rows", "{rows}"],
    "cells": [
        ["of {keys}", "{ours_us:.1f} ({peer_ratio:.2f}x {peer})"],
        ["floor", "{floor_us:.1f}"],
    ],
}


def test_a_grid_has_a_line_a_label_and_a_column_a_head() -> None:
    (text,) = paragraphs(result("some", CASES), [GRID])
    assert text.splitlines() == [
        "| rows | of 4k | floor | of 8k |",
        "|---|---|---|---|",
        # the last case of a line gives a cell whose head is fixed
        "| 1 | 2.0 (1.50x b) | 2.0 | 4.0 (0.50x a) |",
        # no peer was timed, so the templates have no ratio
        "| 8 |  | 2.5 |  |",
    ]


def test_a_grid_without_a_pattern_takes_all_rows() -> None:
    lines = Grid("cases", ("case", "{case}"), [("us", "{times[ours][p50]:g}")]).lines(
        result("some", CASES)
    )
    assert [line.split(" | ")[1].rstrip(" |") for line in lines[2:]] == ["2", "4", "5", "9"]


def test_topk_names_the_fastest_exact_peer(tmp_path: Path) -> None:
    times = {"custom op": 4.0, "FlashInfer": 6.0, "torch": 8.0, "~vLLM coop.": 2.0}
    found = result("topk", [case("1 x 4k", times, "custom op", rows=1, width=4096)])
    assert "| 1 | 4.00 (1.50x FlashInfer) |" in shown(tmp_path, found)


def test_the_siege_is_one_table() -> None:
    lines = _notes.siege_table([0.5, 0.5, 200, 50, 1024, 35]).splitlines()
    assert "| server | processor | commit | kinds x repeats | /health, s | gap, s |" in lines[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert rows[0] == ["allowed", "", "", "", "0.5", "0.5", "200", "50", "1024", "35"]
    # the worst of all kinds, as a number and not as a text
    assert rows[1][:1] + rows[1][3:7] == ["demo model", "58 x 1", "0.47", "0.33", "192"]
    # the server before the limits did not end
    assert rows[-1][-1] == "none"
