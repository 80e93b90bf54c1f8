"""docs/performance.md, docs/results and their plots show the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks._harness import RESULTS, ROOT, write_json
from benchmarks._ratios import CASES, OURS, RATIOS, command_of, drawn
from benchmarks.gpu_run import BENCHMARKS
from benchmarks.report import IMAGES, filled, pages, plots, region, regions
from tests.benchmarks.results import ENV, case, result, shown

COMMITTED = sorted(RESULTS.glob("*.json"))


def gpu_result(**changes: Any) -> dict[str, Any]:
    """Return the record of one case as benchmarks/_gpu.py makes it."""
    times = {"two writes": 3.9, "one launch": 2.0}
    return result("cache_write", [case("128 tokens", times, "one launch")]) | changes


# their regions ask the code for plans of whole models
SLOW_PAGES = ("several-gpus.md", "several-gpus.zh.md")
SHOWING = [
    pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name in SLOW_PAGES))
    for page in pages()
]


@pytest.mark.parametrize("page", SHOWING)
def test_pages_are_made_from_the_committed_results(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text == filled(text), "run python -m benchmarks.report"


def test_every_result_is_on_one_page() -> None:
    # a Chinese page shows the results of its English one again
    english = [page for page in pages() if not page.name.endswith(".zh.md")]
    shown = [name for page in english for name in regions(page.read_text("utf-8"))]
    # the files that the page of the results lists as files without a table
    shown += re.findall(r"`(\w+)\.json`", (ROOT / "docs/results/index.md").read_text("utf-8"))
    assert len(set(shown)) == len(shown)
    assert {path.stem for path in COMMITTED} | set(BENCHMARKS) <= set(shown)


def test_headline_figures_are_those_of_their_results(tmp_path: Path) -> None:
    peers = {"torch ops + two writes": 90.0, "vLLM's two writes": 8.0}
    slower = {"vLLM's two writes": 3.0}
    cases = [case("8 tokens", peers | {"one launch": 4.0}, "one launch")]
    cases += [case("9 tokens", slower | {"one launch": 6.0}, "one launch")]
    write_json(tmp_path / "cache_write.json", result("cache_write", cases))
    write_json(tmp_path / "topk.json", result("topk", cases, gate="failed"))
    head, _, *rows = region("headline", tmp_path).splitlines()
    assert head.startswith("| what | against | ratio |") and len(rows) == 1
    assert "| only vLLM's two writes | 0.50 to 2.00 | 1 of 2 | NVIDIA H200 |" in rows[0]
    assert "`.venv/bin/python -m benchmarks.cache_write`" in rows[0]


def test_an_engine_has_ratios_of_decode_steps_and_others() -> None:
    ratios = {"decode-1x4k": 1.4, "prefill-1x8k": 1.5, "mixed-64x2k": 1.3, "decode-8x4k": None}
    # on two GPUs all cases of DeepSeek-V4 have the same target
    cases = [{"case": name, "target": "V36", "ratio": ratio} for name, ratio in ratios.items()]
    assert list(CASES["gpu_decode"]({"cases": cases})) == [1.4]
    assert list(CASES["gpu_prompts"]({"cases": cases})) == [1.5, 1.3]


def test_ratios_name_benchmarks_and_cases() -> None:
    for entry in RATIOS:
        benchmark = command_of(entry["result"]).partition(" ")[0]
        assert (ROOT / f"benchmarks/{benchmark}.py").exists()
        path = RESULTS / f"{entry['result']}.json"
        # loads are not measured yet
        found = json.loads(path.read_text()) if path.exists() else {}
        for label in entry.get("labels", ()):
            assert any(label in case["times"] for case in found["cases"]), label


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_results_name_machine_and_commit(path: Path) -> None:
    found = json.loads(path.read_text())
    env = found["env"]
    assert env["cpu"] and len(env["commit"]) == 40 and not env["dirty"]
    if found.get("tier") != "T0":
        assert env["gpu"] and env["driver"]
        # what needs no reference: a machine by itself, the same kernels twice, random weights
        alone = ("ceilings", "gpu_dense", "gpu_chain", "gpu_engine", "gpu_experts")
        alone += ("all_reduce_2", "all_reduce_4", "gpu_engine_invariant", "prompt_attention")
        alone += ("once_per_step", "real_widths", "speculative_gpu", "speculative_demo")
        alone += ("gpu_profile", "gpu_engine_2")
        alone += ("gpu_profile_2", "gpu_engine_4", "gpu_profile_4")
        alone += ("gpu_start_4", "once_per_step_61_layers", "once_per_step_61_layers_4")
        alone += ("engine_overlap", "engine_overlap_2", "engine_overlap_4")
        alone += ("v4_gpu", "v4_gpu_fp8", "v4_gpu_profile", "v4_gpu_2", "v4_gpu_profile_2")
        alone += ("load", "load_4", "load_8", "mixed_steps", "mixed_steps_4", "four_bit_experts")
        alone += ("long_contexts", "divided_rows_2", "divided_attention_2", "divided_rows_v4_2")
        alone += ("once_per_step_v4", "long_contexts_v4", "host_tier_v4")
        alone += ("speculative_gpu_v4", "real_widths_v4")
        assert found.get("gate") == "passed" or path.stem in alone


def test_plots_show_the_committed_results() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import digest

    for path, found in plots():
        assert digest(found) in path.read_text("utf-8"), "run python -m benchmarks.report"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gate": "failed"}, "correctness tests of this run: failed"),
        ({"gate": "not run"}, "correctness tests of this run: not run"),
        ({"env": ENV | {"dirty": True}}, "no commit"),
        ({"env": ENV | {"form": "fake"}}, "without a GPU"),
    ],
)
def test_no_figure_without_green_tests_and_a_commit(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    text = shown(tmp_path, gpu_result(**changes))
    assert said in text and not re.search(r"\d", text)


def test_what_was_not_measured_or_was_cut_off_says_so(tmp_path: Path) -> None:
    assert region("cache_write", tmp_path) == "Not measured yet.\n"
    text = shown(tmp_path, gpu_result(error="RuntimeError: gone"))
    assert "cut off: RuntimeError: gone" in text and "**2.00**" in text


def test_only_the_marked_regions_change(tmp_path: Path) -> None:
    write_json(tmp_path / "cache_write.json", gpu_result())
    page = "before\n<!-- result: cache_write -->\nold\n<!-- end -->\nafter\n"
    new = filled(page, tmp_path)
    assert new.startswith("before\n") and new.endswith("<!-- end -->\nafter\n")
    assert "old" not in new and "**2.00**" in new
    assert filled(new, tmp_path) == new


def test_a_plot_is_the_same_every_time() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import digest, picture

    us = {"DeepGEMM": 5.0, "tiles": 4.0}
    cases = [case("decode, 64 heads, 1 x 4k", us, "tiles")]
    shown = {"groups": drawn("indexer_logits", result("indexer_logits", cases))}
    svg = picture(shown)
    assert svg == picture(shown) and digest(shown) in svg
    for text in ("decode, 64 heads, 1 x 4k", OURS, "5.00 us", "relative to fd_dsa"):
        assert text in svg
    shown["groups"][0]["relative"]["DeepGEMM"] = 1.3
    assert digest(shown) not in svg


def test_every_picture_is_shown() -> None:
    pictures = {
        (page.parent / picture).resolve()
        for page in pages()
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text("utf-8"))
    }
    shown = {path for path in pictures if path.parent == IMAGES and path.suffix == ".svg"}
    assert shown == {path.resolve() for path, _ in plots()}
    assert {path.name for path in shown} == {path.name for path in IMAGES.glob("*.svg")}
