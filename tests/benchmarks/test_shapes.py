"""Shapes of the GPU benchmarks, and the least that each must read, write and compute."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks import _logits_sides as logits
from benchmarks import layer_stack as stack
from benchmarks._layer import Sizes, floor_us, layer_bytes, layer_flops
from benchmarks._logits_sides import Shape
from benchmarks.overlap import thresholds

DECODE, DRAFTS = Shape(64, 3, 640), Shape(32, 2, 128, 4)
PROMPT = Shape(64, 1, 4096, 2048, is_prompt=True)
FAST_COPY = {"copy_bytes_per_s": 1e18, "matrix_flops_per_s": 8e14}
FAST_GEMMS = {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 1e18}


@pytest.mark.parametrize("shape", [DECODE, DRAFTS, PROMPT])
def test_pairs_are_counted_token_by_token(shape: Shape) -> None:
    windows = [shape.keys - shape.new + j + 1 for j in range(shape.new)] * shape.rows
    assert shape.num_tokens == len(windows)
    assert shape.pairs == sum(windows)
    assert shape.flops == sum(2 * shape.heads * 128 * window for window in windows)
    queries = len(windows) * shape.heads * (128 + 4)
    assert shape.bytes_moved == 132 * shape.rows * shape.keys + queries + 4 * sum(windows)
    assert shape.num_pages * 64 == shape.rows * shape.keys


def test_the_floor_is_the_longer_of_two() -> None:
    # the floor of one token a row comes from its bytes, that of a prompt from its FLOPs
    assert DECODE.floor_us(4e12, 1.5e15) == pytest.approx(DECODE.bytes_moved / 4e6)
    assert PROMPT.floor_us(4e12, 1.5e15) == pytest.approx(PROMPT.flops / 1.5e9)
    layer = DECODE, Sizes(), 400 << 20
    assert floor_us(*layer, FAST_COPY) == pytest.approx(layer_flops(*layer) / 8e8)
    assert floor_us(*layer, FAST_GEMMS) == pytest.approx(layer_bytes(*layer) / 4e6)


def test_the_least_bytes_and_operations_of_a_layer() -> None:
    shape, sizes = Shape(16, 3, 4096), Sizes(heads=16)
    assert layer_bytes(shape, sizes, 1000) == 1000 + 3 * (4096 * 132 + 2048 * 656)
    assert layer_bytes(Shape(16, 1, 100), sizes, 0) == 100 * (132 + 656)
    # a prompt's last chunk: every key is read once, whatever its tokens choose
    assert layer_bytes(PROMPT, sizes, 0) == 4096 * (132 + 656)
    # two GEMMs over every selected key, of 576 and 512 values
    assert layer_flops(shape, sizes, 1000) == 2 * 3 * (500 + 16 * 2048 * (576 + 512))


def test_every_shape_has_a_name_of_its_own() -> None:
    scored = list(logits.shapes())
    labels = [shape.label for shape in scored]
    assert len(set(labels)) == len(labels) > 40
    assert {shape.label for shape in logits.shapes(quick=True)} <= set(labels)
    assert "decode, 64 heads, 64 x 32k, 2 tokens" in labels
    assert "prompt, 32 heads, 2048 of 64k" in labels
    # rows of three tokens, and one row, are what the targets name
    assert {(s.rows, s.new) for s in scored} >= {(1, 1), (64, 3), (128, 1)}
    labels = [stack.name_of(shape) for shape in stack.shapes(stack.HEADS)]
    assert len(set(labels)) == len(labels) == 18
    assert labels[0] == "128 heads, 1 x 4k" and labels[-1] == "16 heads, 128 x 128k"
    assert {stack.name_of(shape) for shape in stack.shapes(stack.HEADS, quick=True)} <= set(labels)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [DECODE, DRAFTS, PROMPT])
def test_forms_differ_from_the_one_that_serves(shape: Shape) -> None:
    from benchmarks.tune import CHOSEN, tile_forms

    tried = tile_forms(shape)
    assert next(iter(tried.items())) == (CHOSEN, logits.form_of(shape))
    assert len(set(tried.values())) == len(tried) > 8


def test_thresholds_end_before_the_first_loss() -> None:
    def measured(kind: str, *saved: tuple[int, float]) -> list[dict[str, Any]]:
        return [{"num_tokens": tokens, "saved": share, "kind": kind} for tokens, share in saved]

    graph = measured("graph", (256, 0.1), (1, 0.03), (8, 0.02), (64, -0.009), (128, -0.02))
    beside = measured("graph, k_norm beside", (64, -0.02))
    eager = measured("eager", (1, -0.02), (8, 0.1))
    assert thresholds(graph + eager) == {"graph": 64, "eager": 0}
    assert thresholds(graph + beside + eager) == {"graph": 8, "eager": 0}
