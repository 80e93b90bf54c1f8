"""How the result of sparse MLA is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._harness import write_json
from benchmarks.report import plots, region

ENV = {"gpu": "NVIDIA H200", "driver": "580.1", "python": "3.12.3", "commit": "c" * 40}
ENV |= {"dirty": False}


def case(kind: str, heads: int, gate: float, ratio: float) -> dict[str, Any]:
    times = {"FlashMLA of vLLM": 10 * ratio, "gather alone": 4.0, "ours": 10.0}
    if not ratio:
        del times["FlashMLA of vLLM"]
    return {
        "case": f"{kind}, {heads} heads",
        "tier": "T1",
        "times": {label: {"p20": us, "p50": us, "p80": us} for label, us in times.items()},
        "ours": "ours",
        "ratios": {label: us / 10 for label, us in times.items() if label != "ours"},
        "floor_us": 4.0,
        "percent_of_floor": 40.0,
        "kind": kind,
        "heads": heads,
        "gate": gate,
        "ratio_best": ratio,
        "errors": {"ours": 1e-3 * gate, "FlashMLA of vLLM": 4e-3},
    }


def rendered(folder: Path, **changes: Any) -> str:
    cases = [
        case("decode", 128, 0.6, 0.9),
        case("decode", 64, 0.6, 0.8),
        case("decode", 16, 1.5, 2.0),
        case("prefill FP8", 16, 1.5, 0),
    ]
    result = {
        "name": "sparse_mla",
        "env": ENV,
        "gate": "passed",
        "clocks": [],
        "ceilings": {"copy_bytes_per_s": 4.2e12, "node_us": 0.5},
        "cases": cases,
    }
    write_json(folder / "sparse_mla.json", result | changes)
    return region("sparse_mla", folder)


def test_least_ratios_and_errors(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert "| decode, 16 heads | 20.0 (2.00x) | 4.00 (0.40x) | **10.0** | 40% | T1 |" in text
    assert (
        "the fastest peer is, decode: at 128, 64 heads at least 0.80 (decode, 64 heads), wanted "
        "0.6; at 16 heads at least 2.00 (decode, 16 heads), wanted 1.5."
    ) in text
    assert "prefill FP8: " not in text
    assert "doubles, relative: ours 1.5e-03, FlashMLA of vLLM 4.0e-03." in text
    assert list(plots(tmp_path)) == []


def test_nothing_without_green_tests(tmp_path: Path) -> None:
    text = rendered(tmp_path, gate="failed")
    assert "No figures." in text and "at least" not in text
