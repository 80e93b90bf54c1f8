"""How the result of FlashMLA and DeepGEMM is shown: steps that all models have, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._harness import write_json
from benchmarks.report import plots, region

DECODE, SHORT, PROMPT = "32 x 32768 keys, 1 new", "32 x 4096 keys, 1 new", "2048 of 32 k"


def case(what: str, step: str, heads: int, times: dict[str, float], **notes: Any) -> dict[str, Any]:
    label = next(name for name in times if name != "our kernel")
    return {
        "case": f"{what}, {heads} heads, {step}",
        "what": what,
        "step": step,
        "heads": heads,
        "tier": "T1",
        "times": {n: {"p20": us * 0.99, "p50": us, "p80": us * 1.01} for n, us in times.items()},
        "ours": label,
        "ratios": {"our kernel": times.get("our kernel", 0) / times[label]},
        "floor_us": 1.0,
        "percent_of_floor": 10.0,
        "host_us": {},
    } | notes


def attention(step: str, heads: int, ours: float, theirs: float) -> dict[str, Any]:
    times = {"our kernel": ours, "FlashMLA": theirs}
    return case("attention", step, heads, times, kernel_heads=64 if heads < 64 else heads)


def result(**changes: Any) -> dict[str, Any]:
    """One model with its indexer at three steps, and a share of its heads at two of them."""
    paged = {"our kernel": 154.5, "DeepGEMM, pages": 39.1}
    both = {"our kernel": 9431.0, "DeepGEMM, pages": 20.0, "DeepGEMM, gathered": 1160.0}
    twos = paged | {"DeepGEMM, rows of 2": 35.0}
    in_pages = case("scores, all in pages", PROMPT, 64, {"DeepGEMM, pages": 1286.0})
    del in_pages["heads"]
    return {
        "name": "providers",
        "env": {
            "gpu": "NVIDIA H200",
            "driver": "580.1",
            "python": "3.12.3",
            "commit": "c" * 40,
            "dirty": False,
        },
        "gate": "passed",
        "clocks": [],
        "ceilings": {"copy_bytes_per_s": 4.2e12, "node_us": 0.5},
        "peer": "FlashMLA and DeepGEMM of a release",
        "cases": [
            case("scores", SHORT, 64, twos),
            attention(SHORT, 128, 1266.0, 68.8),
            case("scores", DECODE, 64, twos),
            case("selection", DECODE, 64, {"our kernel": 634.0, "DeepGEMM": 526.0}),
            attention(DECODE, 128, 1276.0, 68.6),
            case("scores", PROMPT, 64, both),
            in_pages,
            attention(PROMPT, 128, 67174.0, 3940.0),
            attention(DECODE, 16, 1287.0, 52.3),
            attention(PROMPT, 16, 8000.0, 1900.0),
        ],
        "checks_128": {
            DECODE: {"recall": 1.0, "attention": 3.7e-3, "pages": 1.2e-4},
            PROMPT: {"recall": 0.9985, "attention": 3.6e-3, "gathered": 1.5e-4},
        },
        "checks_16": {DECODE: {"recall": 1.0, "attention": 3.9e-3, "pages": 1.1e-4}},
    } | changes


def rendered(folder: Path, **changes: Any) -> str:
    write_json(folder / "providers.json", result(**changes))
    return region("providers", folder)


def test_steps_of_all_models_beside_each_other(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert "NVIDIA H200" in text and "FlashMLA and DeepGEMM of a release" in text
    assert "| ours / FlashMLA, us | 128 heads | 16 heads, padded to 64 | tier |" in text
    assert f"| {DECODE} | 1,276 / 68.6 (18.6x) | 1,287 / 52.3 (24.6x) | T1 |" in text
    assert f"| {PROMPT} | 67,174 / 3,940 (17.0x) | 8,000 / 1,900 (4.21x) | T1 |" in text
    assert SHORT not in text


def test_tokens_of_both_kinds_are_added_up(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert "| scores, 64 index heads | selection, 64 index heads | tier |" in text
    # gathered and paged; another form of the same rows is none of them
    assert f"| {PROMPT} | 9,431 / 1,180 (7.99x) |  | T1 |" in text
    assert f"| {DECODE} | 154 / 39.1 (3.95x) | 634 / 526 (1.21x) | T1 |" in text


def test_the_largest_deviations_are_told(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert "attention 3.9e-03, scores 1.5e-04" in text and "at least 99.85%" in text


def test_a_run_that_was_cut_off(tmp_path: Path) -> None:
    cases = result()["cases"][:2]
    text = rendered(tmp_path, cases=cases, error="KeyboardInterrupt: ", checks_128={}, checks_16={})
    assert f"| {SHORT} | 1,266 / 68.8 (18.4x) | T1 |" in text
    assert "The run was cut off: KeyboardInterrupt" in text and "deviation" not in text


def test_nothing_without_green_tests(tmp_path: Path) -> None:
    text = rendered(tmp_path, gate="not run")
    assert "tests of this run: not run" in text and "|" not in text


def test_seventy_cases_have_no_plot(tmp_path: Path) -> None:
    assert "svg" not in rendered(tmp_path)
    assert list(plots(tmp_path)) == []
