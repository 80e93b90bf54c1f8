"""What the committed results do not show of the renderer: failures, gaps, groups and aims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks._render import rows_at
from tests.benchmarks.results import case, result, shown


def test_a_stack_without_peers_names_what_is_missing(tmp_path: Path) -> None:
    alone = {"launches": 430, "copies": 0, "host_waits": 0, "allocations": 0}
    notes: dict[str, Any] = {"kind": "eager", "rows": 1, "keys": 4096, "package_alone": alone}
    notes |= {"made_by": {}, "left_out": {"peers": "LookupError: kernels of vLLM"}}
    cases = [case("16 heads, 1 x 4k, eager", {"A": 12.0, "ours": 10.0}, "ours", **notes)]
    changes: dict[str, Any] = {"failed": {"16 heads, 1 x 32k": "A differs from ours"}}
    changes |= {"custom_ops": {"topk": True, "sparse_mla": "heads are off"}}
    changes |= {"not_run": ["128 heads, 1 x 4k"]}
    text = shown(tmp_path, result("layer_stack", cases, **changes))
    assert "Left out: peers (LookupError: kernels of vLLM)." in text and "fastest of" not in text
    assert "430 launches, 0 copies, 0 host waits, 0 allocations" in text
    assert "Of custom_ops/ did not serve: sparse_mla." in text
    assert "Failed: 16 heads, 1 x 32k." in text
    assert "Not run, for want of time: 128 heads, 1 x 4k." in text


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
