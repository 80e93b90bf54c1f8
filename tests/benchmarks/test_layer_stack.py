"""Shapes of the stack of layers, and the least that each must read and compute."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from benchmarks._layer import Shape, Sizes
from benchmarks.layer_stack import HEADS, shapes

V32 = Sizes()


def test_the_least_bytes_and_operations() -> None:
    shape, weights = Shape(16, 3, 4096), 1000
    assert shape.cache_blocks == 3 * 64
    assert shape.layer_bytes(weights, V32) == 1000 + 3 * (4096 * 132 + 2048 * 656)
    assert Shape(16, 1, 100).layer_bytes(0, V32) == 100 * (132 + 656)
    # the last chunk of a prompt: every row is read once, whatever its tokens choose
    chunk = Shape(128, 1, 4096, 2048)
    assert chunk.layer_bytes(0, V32) == 4096 * (132 + 656) and chunk.num_tokens == 2048
    # two products over every selected key, of 576 and 512 values
    assert shape.layer_flops(weights, V32) == 2 * 3 * (500 + 16 * 2048 * (576 + 512))


def test_the_floor_is_the_longer_of_two() -> None:
    shape = Shape(128, 128, 4096)
    read = shape.layer_bytes(400 << 20, V32) / 4e6
    products = shape.layer_flops(400 << 20, V32) / 8e8
    fast_copy = {"copy_bytes_per_s": 1e15, "matrix_flops_per_s": 8e14}
    fast_products = {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 1e18}
    assert shape.floor_us(400 << 20, V32, fast_copy) == pytest.approx(products)
    assert shape.floor_us(400 << 20, V32, fast_products) == pytest.approx(read)


def test_all_shapes_of_the_target() -> None:
    labels = [shape.label for shape in shapes(HEADS)]
    assert len(set(labels)) == len(labels) == 18
    assert labels[0] == "128 heads, 1 x 4k" and labels[-1] == "16 heads, 128 x 128k"
    assert {shape.label for shape in shapes(HEADS, quick=True)} <= set(labels)
