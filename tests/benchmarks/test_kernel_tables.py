"""How the results of the top-k, of sparse MLA and of the indexer's scores are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.benchmarks.results import case, result, shown


def topk(rows: int, width: int, same: float, best: float, **right: float) -> dict[str, Any]:
    us = {"FlashInfer low": 10 * same, "torch": 10 * best, "~fast": 9.0, "custom op": 10.0}
    notes = {"rows": rows, "width": width << 10, "ratio_same_rule": same, "ratio_best_exact": best}
    notes["share_right"] = {f"~{label}": share for label, share in right.items()}
    return case(f"{rows} x {width}k", us, "custom op", **notes)


def test_topk_least_ratios_and_what_others_miss(tmp_path: Path) -> None:
    cases = [
        topk(1, 4, 1.2, 0.9),
        topk(1, 16, 2.0, 1.6, fast=0.999),
        topk(32, 32, 1.8, 1.55, fast=0.9),
        topk(64, 64, 1.9, 1.7, fast=0.95),
    ]
    text = shown(tmp_path, result("topk", cases, same_rule="FlashInfer low"))
    assert "| 32 x 32k | 18.0 (1.80x) | 15.5 (1.55x) | 9.00 (0.90x) | **10.0** | 50% | T1 |" in text
    assert (
        "our rule for equal scores (FlashInfer low), relative to ours: everywhere at least 1.20 "
        "(1 x 4k), at 32 rows and more of 32k and more at least 1.80 (32 x 32k), at one row of "
        "16k and more at least 2.00 (1 x 16k)."
    ) in text
    assert "the fastest exact peer of each case, relative to ours: everywhere at least 0.90" in text
    assert "not among the best: ~fast up to 10.0% (32 x 32k)." in text


def sparse_mla(kind: str, heads: int, gate: float, ratio: float) -> dict[str, Any]:
    us = {"FlashMLA of vLLM": 10 * ratio} if ratio else {}
    us |= {"gather alone": 4.0, "ours": 10.0}
    notes: dict[str, Any] = {"kind": kind, "heads": heads, "gate": gate, "ratio_best": ratio}
    notes["errors"] = {"ours": 1e-3 * gate, "FlashMLA of vLLM": 4e-3}
    return case(f"{kind}, {heads} heads", us, "ours", **notes)


def test_sparse_mla_least_ratios_and_errors(tmp_path: Path) -> None:
    cases = [
        sparse_mla("decode", 128, 0.6, 0.9),
        sparse_mla("decode", 64, 0.6, 0.8),
        sparse_mla("decode", 16, 1.5, 2.0) | {"left_out": {"public Triton": "no 16 heads"}},
        sparse_mla("prefill FP8", 16, 1.5, 0),
    ]
    text = shown(tmp_path, result("sparse_mla", cases))
    assert "| decode, 16 heads | 20.0 (2.00x) | 4.00 (0.40x) | **10.0** | 50% | T1 |" in text
    assert (
        "the fastest peer relative to ours, decode: at 128, 64 heads at least 0.80 (decode, 64 "
        "heads), aim 0.6; at 16 heads at least 2.00 (decode, 16 heads), aim 1.5."
    ) in text
    assert "prefill FP8: " not in text
    assert "doubles, relative: ours 1.5e-03, FlashMLA of vLLM 4.0e-03." in text
    assert "Left out: public Triton (no 16 heads)." in text
