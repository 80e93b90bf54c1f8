"""What the committed results do not show of the renderer: failures, gaps, groups and aims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks._render import rows_at
from tests.benchmarks.results import case, result, shown


def sparse_mla(kind: str, heads: int, ratio: float) -> dict[str, Any]:
    us = {"FlashMLA of vLLM": 10 * ratio} if ratio else {}
    us |= {"gather alone": 4.0, "ours": 10.0}
    errors = {"ours": 1e-4 * heads, "FlashMLA of vLLM": 4e-3}
    return case(f"{kind}, {heads} heads", us, "ours", kind=kind, heads=heads, errors=errors)


def test_groups_of_cases_with_their_aims_and_errors(tmp_path: Path) -> None:
    cases = [
        sparse_mla("decode", 128, 0.9),
        sparse_mla("decode", 64, 0.8),
        sparse_mla("decode", 16, 2.0) | {"left_out": {"public Triton": "no 16 heads"}},
        sparse_mla("prefill FP8", 16, 0),
    ]
    text = shown(tmp_path, result("sparse_mla", cases))
    assert "| decode, 16 heads | 20.0 (2.00x) | 4.00 (0.40x) | **10.0** | 50% | T1 |" in text
    row = "decode, 64 and 128 heads | the faster FlashMLA | 0.80 (decode, 64 heads) | 0.90 (decode"
    assert f"{row}, 128 heads) | 2 of 2 | 0.6 |" in text
    assert "over FP8" not in text
    assert "doubles, relative: ours 1.3e-02, FlashMLA of vLLM 4.0e-03." in text
    assert "Left out: public Triton (no 16 heads)." in text


def test_a_group_has_the_fastest_peer_and_the_numbers_of_its_range(tmp_path: Path) -> None:
    def topk(rows: int, width: int, same: float, best: float, missed: float) -> dict[str, Any]:
        us = {"FlashInfer low": 10 * same, "torch": 10 * best, "~fast": 9.0, "custom op": 10.0}
        notes = {"rows": rows, "width": width << 10, "share_right": {"~fast": 1 - missed}}
        return case(f"{rows} x {width}k", us, "custom op", **notes)

    cases = [topk(1, 4, 1.2, 0.9, 0), topk(1, 16, 2.0, 1.6, 0.1), topk(32, 32, 1.8, 1.5, 0.05)]
    text = shown(tmp_path, result("topk", cases))
    exact, same = "the fastest exact kernel of FlashInfer, vLLM, torch", "FlashInfer low, which has"
    assert f"| top-k | {exact} | 0.90 (1 x 4k) | 1.60 (1 x 16k) | 1 of 3 |" in text
    assert f"32 rows and more of 32k and more | {exact} | 1.50 (32 x 32k)" in text
    assert f"one row of 16k and more | {same} our rule for equal scores | 2.00 (1 x 16k)" in text
    assert "not among the best: ~fast up to 10.0% (1 x 16k)." in text


def test_a_stack_without_peers_names_what_is_missing(tmp_path: Path) -> None:
    alone = {"launches": 430, "copies": 0, "host_waits": 0, "allocations": 0}
    notes: dict[str, Any] = {"kind": "eager", "rows": 1, "keys": 4096, "package_alone": alone}
    notes |= {"made_by": {}, "left_out": {"peers": "LookupError: kernels of vLLM"}}
    cases = [case("16 heads, 1 x 4k, eager", {"A": 12.0, "ours": 10.0}, "ours", **notes)]
    changes: dict[str, Any] = {"failed": {"16 heads, 1 x 32k": "A differs from ours"}}
    changes |= {"custom_ops": {"topk": True, "sparse_mla": "heads are off"}}
    changes |= {"not_run": ["128 heads, 1 x 4k"]}
    text = shown(tmp_path, result("layer_stack", cases, **changes))
    assert "| decode step of 61 layers, eager, one row | A | 1.20 (16 heads" in text
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
