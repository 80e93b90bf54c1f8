"""Shapes of the GPU benchmarks, and the least that each must read, write and compute."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from benchmarks import _logits_sides as logits
from benchmarks._logits_sides import Shape

DECODE, DRAFTS = Shape(64, 3, 640), Shape(32, 2, 128, 4)
PROMPT = Shape(64, 1, 4096, 2048, is_prompt=True)


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


def test_every_shape_has_a_name_of_its_own() -> None:
    scored = list(logits.shapes())
    labels = [shape.label for shape in scored]
    assert len(set(labels)) == len(labels) > 40
    assert {shape.label for shape in logits.shapes(quick=True)} <= set(labels)
    assert "decode, 64 heads, 64 x 32k, 2 tokens" in labels
    assert "prompt, 32 heads, 2048 of 64k" in labels
    # rows of three tokens, and one row, are what the targets name
    assert {(s.rows, s.new) for s in scored} >= {(1, 1), (64, 3), (128, 1)}


@pytest.mark.triton
@pytest.mark.parametrize("shape", [DECODE, DRAFTS, PROMPT])
def test_forms_differ_from_the_one_that_serves(shape: Shape) -> None:
    from benchmarks.tune import CHOSEN, tile_configs

    tried = tile_configs(shape)
    assert next(iter(tried.items())) == (CHOSEN, logits.config_of(shape))
    assert len(set(tried.values())) == len(tried) > 8
