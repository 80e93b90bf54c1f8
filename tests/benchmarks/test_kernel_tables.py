"""Failures, gaps, groups and aims of the renderer, which committed results do not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks._render import rows_at
from tests.benchmarks.results import case, result, shown


def test_a_result_names_what_is_missing(tmp_path: Path) -> None:
    notes: dict[str, Any] = {"errors": {"tiles": 1e-5}, "left_out": {"DeepGEMM": "no nvcc"}}
    cases = [case("decode, 64 heads, 1 x 4k", {"tiles": 10.0}, "tiles", **notes)]
    changes: dict[str, Any] = {"failed": {"decode, 64 heads, 1 x 32k": "off by 1"}}
    changes |= {"not_run": ["prompt, 64 heads, 2048 of 8k"]}
    text = shown(tmp_path, result("indexer_logits", cases, **changes))
    assert "relative: tiles 1.0e-05." in text
    assert "Left out: DeepGEMM (no nvcc)." in text
    assert "Failed: decode, 64 heads, 1 x 32k." in text
    assert "Not run, for want of time: prompt, 64 heads, 2048 of 8k." in text


@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("a.1", [5, 6]),
        ("b.*", [{"key": "x", "n": 1, "in": {"p": 2}}]),
        ("b.*.in.*", [{"key": "p", "n": 1, "in": {"p": 2}}]),
    ],
)
def test_paths_of_rows(path: str, rows: list[Any]) -> None:
    value = {"a": [[4], [5, 6]], "b": {"x": {"n": 1, "in": {"p": 2}}}}
    assert list(rows_at(value, path)) == rows
