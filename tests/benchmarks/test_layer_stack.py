"""Shapes of the stack of layers, what is wanted of them, and how its result is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks._stack_shapes import HEADS, LAYERS, Shape, shapes
from tests.benchmarks import results


def test_the_least_bytes_and_operations() -> None:
    shape, weights = Shape(16, 3, 4096), 1000
    assert shape.cache_blocks == 3 * 64
    assert shape.layer_bytes(weights) == 1000 + 3 * (4096 * 132 + 2048 * 656)
    assert Shape(16, 1, 100).layer_bytes(0) == 100 * (132 + 656)
    # two products over every selected key, of 576 and 512 values
    assert shape.layer_flops(weights) == 2 * 3 * (500 + 16 * 2048 * (576 + 512))


def test_the_floor_is_the_longer_of_two() -> None:
    shape = Shape(128, 128, 4096)
    read = LAYERS * shape.layer_bytes(400 << 20) / 4e6
    products = LAYERS * shape.layer_flops(400 << 20) / 8e8
    fast_copy = {"copy_bytes_per_s": 1e15, "matrix_flops_per_s": 8e14}
    fast_products = {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 1e18}
    assert shape.floor_us(400 << 20, fast_copy) == pytest.approx(products)
    assert shape.floor_us(400 << 20, fast_products) == pytest.approx(read)


def test_all_shapes_of_the_target() -> None:
    labels = [shape.label for shape in shapes(HEADS)]
    assert len(set(labels)) == len(labels) == 18
    assert labels[0] == "128 heads, 1 x 4k" and labels[-1] == "16 heads, 128 x 128k"
    assert {shape.label for shape in shapes(HEADS, quick=True)} <= set(labels)


def test_more_is_wanted_of_some() -> None:
    in_graphs = {s.label for s in shapes((128,)) if s.wanted("B", "graph") == 1.13}
    assert in_graphs == {"128 heads, 1 x 4k", "128 heads, 32 x 4k"}
    assert {s.rows for s in shapes((128,)) if s.wanted("A", "eager") == 1.5} == {1}
    assert {s.wanted("A", "graph") for s in shapes((128,))} == {1}


def case(shape: Shape, kind: str, a: float, b: float, **notes: Any) -> dict[str, Any]:
    """A case of which ours takes 10 ms."""
    us = {"A": 1e4 * a, "B": 1e4 * b, "B and rest": 1.2e4, "peers": 0.9e4, "ours": 1e4}
    notes |= {
        "kind": kind,
        "wanted": {label: shape.wanted(label, kind) for label in ("A", "B")},
        "errors": {"ours": {"recall": 1.0, "attention": 2e-3}},
        "left_out": {},
        "made_by": {"top-k": "FlashInfer"},
    }
    return results.case(f"{shape.label}, {kind}", us, "ours", **notes)


def rendered(folder: Path, **changes: Any) -> str:
    short, long = Shape(128, 1, 4096), Shape(128, 128, 128 << 10)
    alone = {"launches": 430, "copies": 0, "host_waits": 0, "allocations": 0}
    counts = {"launches": 1300, "host_waits": 0, "allocations": 480, "package_alone": alone}
    cases = [
        case(short, "graph", 1.08, 1.14),
        case(short, "eager", 1.2, 1.6, **counts),
        case(long, "graph", 0.99, 1.01),
    ]
    changes = {"not_run": ["16 heads, 1 x 4k"]} | changes
    return results.shown(folder, results.result("layer_stack", cases) | changes)


def test_what_is_wanted_stands_beside_what_was_found(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert "| 128 heads, 1 x 4k, eager | 12,000 (1.20x) | 16,000 (1.60x) |" in text
    assert "B, graph: at least 1.140x (B, 128 heads, 1 x 4k, graph), aim 1.130x: met" in text
    assert "A, eager: at least 1.200x (A, 128 heads, 1 x 4k, eager), aim 1.500x: missed" in text
    assert "A and B elsewhere: at least 0.990x (A, 128 heads, 128 x 128k, graph)" in text
    assert "430 launches, 0 copies, 0 waits of the host, 0 allocations" in text
    assert "in one case or another: top-k by FlashInfer." in text
    assert "relative: ours 2.0e-03." in text and "Not run, for want of time: 16 heads" in text


def test_sides_that_were_left_out_are_named(tmp_path: Path) -> None:
    only = case(Shape(16, 32, 4096), "graph", 1.1, 1.2)
    del only["times"]["peers"], only["ratios"]["peers"]
    only["made_by"], only["left_out"] = {}, {"peers": "LookupError: kernels of vLLM"}
    text = rendered(tmp_path, cases=[only], not_run=[])
    assert "Left out: peers (LookupError: kernels of vLLM)." in text
    assert "Time of peers" not in text and "launches" not in text


def test_what_went_wrong_is_named(tmp_path: Path) -> None:
    serving = {"topk": True, "sparse_mla": "7 heads of the probe are off by 1.0e+00"}
    failed = {"16 heads, 1 x 32k": "AssertionError: A differs from ours"}
    text = rendered(tmp_path, custom_ops=serving, failed=failed)
    assert "Of custom_ops/ did not serve: sparse_mla." in text
    assert "Failed: 16 heads, 1 x 32k." in text
