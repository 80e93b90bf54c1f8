"""Cache rows: where they are written, how they are rounded, and how they are read back."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.ops._host import Scratch
from fd_dsa.ops.cache_write import write_cache
from fd_dsa.ops.cache_write.paddle_impl import gather_rows
from tests.reference.bfloat16 import ref_array, ref_bits

UNTOUCHED = 77


def written(values: np.ndarray, slots: list[int], num_slots: int, dtype: type) -> np.ndarray:
    """A cache of `UNTOUCHED` after one write."""
    cache = np.full((num_slots, values.shape[1]), UNTOUCHED, dtype)
    write_cache(cache, (values,), np.array(slots, np.int64))
    return cache


@given(st.lists(st.floats(width=32), min_size=1, max_size=8))
@settings(max_examples=400)
def test_bfloat16_bits_of_any_value(values: list[float]) -> None:
    row = np.array([values], np.float32)
    found = written(row, [0], 1, np.int16).view(np.uint16)[0]
    for value, bits in zip(row[0], found, strict=True):
        if np.isnan(value):
            # any quiet NaN
            assert bits & 0x7FC0 == 0x7FC0, hex(bits)
        else:
            assert bits == ref_bits(float(value)), float(value).hex()


@pytest.mark.parametrize(
    ("bits", "wanted"),
    [
        (0x3F808000, 0x3F80),  # half way, even below
        (0x3F818000, 0x3F82),  # half way, even above
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0xBF818000, 0xBF82),
        (0x80000000, 0x8000),  # -0.0
        (0x00000001, 0x0000),  # the smallest subnormal
        (0x00018000, 0x0002),  # a subnormal half way
        (0x7F800000, 0x7F80),
        (0xFF800000, 0xFF80),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 rounds to infinity
        (0x7F7F7FFF, 0x7F7F),
    ],
)
def test_bfloat16_ties_and_limits(bits: int, wanted: int) -> None:
    row = np.array([[bits]], np.uint32).view(np.float32)
    assert hex(written(row, [0], 1, np.int16).view(np.uint16)[0, 0]) == hex(wanted)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000])
def test_every_nan_stays_nan(bits: int) -> None:
    row = np.array([[bits]], np.uint32).view(np.float32)
    found = int(written(row, [0], 1, np.int16).view(np.uint16)[0, 0])
    assert found & 0x7F80 == 0x7F80
    assert found & 0x007F


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_slots_of_minus_one_are_skipped(dtype: type) -> None:
    values = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    cache = written(values, [5, -1, 0, -1], 6, dtype)
    assert (cache[[1, 2, 3, 4]] == UNTOUCHED).all()
    found = np.empty((2, 2), np.float32)
    gather_rows(cache, np.array([5, 0]), found, Scratch())
    assert found.tolist() == [[1, 2], [5, 6]]


@pytest.mark.parametrize("slots", [[], [-1, -1]])
def test_a_step_without_slots_writes_nothing(slots: list[int]) -> None:
    cache = written(np.ones((len(slots), 2), np.float32), slots, 3, np.float32)
    assert (cache == UNTOUCHED).all()


def test_float32_is_written_bit_by_bit() -> None:
    bits = np.array([[0x7FC00001, 0x80000000, 0x00000001, 0x7F7FFFFF]], np.uint32)
    found = written(bits.view(np.float32), [1], 2, np.float32)
    assert found.view(np.uint32)[1].tolist() == bits[0].tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_parts_lie_side_by_side_in_paddle_memory(dtype: type) -> None:
    rng = np.random.default_rng(0)
    latent, rope = rng.standard_normal((3, 5)), rng.standard_normal((3, 2))
    cache = paddle.to_tensor(np.full((4, 7), UNTOUCHED, dtype))
    parts = tuple(paddle.to_tensor(p.astype(np.float32)) for p in (latent, rope))
    write_cache(cache, parts, paddle.to_tensor(np.array([2, -1, 3], np.int64)))
    rows = np.concatenate([latent, rope], axis=1).astype(np.float32)
    found = np.empty((2, 7), np.float32)
    gather_rows(cache.numpy(), np.array([2, 3]), found, Scratch())
    np.testing.assert_array_equal(found, (rows if dtype == np.float32 else ref_array(rows))[[0, 2]])
    assert (cache.numpy()[:2] == UNTOUCHED).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_gather_repeats_and_reorders(dtype: type) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((6, 4, 3)).astype(np.float32)
    cache = np.empty_like(values, dtype)
    write_cache(cache.reshape(24, 3), (values.reshape(24, 3),), np.arange(24))
    index = np.array([5, 0, 5, 2])
    found = np.full((4, 4, 3), np.nan, np.float32)
    gather_rows(cache, index, found, Scratch())
    wanted = values[index] if dtype == np.float32 else ref_array(values[index])
    np.testing.assert_array_equal(found, wanted)


def test_gather_keeps_nan_and_infinities_of_bfloat16() -> None:
    cache = np.array([[0x7FC0], [0x7F80], [0xFF80], [0x8000]], np.uint16).view(np.int16)
    found = np.empty((4, 1), np.float32)
    gather_rows(cache, np.arange(4), found, Scratch())
    assert np.isnan(found[0, 0])
    assert found[1:3, 0].tolist() == [np.inf, -np.inf]
    assert found.view(np.uint32)[3, 0] == 0x80000000


@pytest.mark.parametrize(
    ("cache", "parts", "slots", "error", "said"),
    [
        (
            np.zeros((4, 5), np.float32),
            (np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)),
            np.zeros(2, np.int64),
            ShapeError,
            r"cache has shape \[4, 5\].*\[\*, 6\]",
        ),
        (
            np.zeros((4, 3), np.float32),
            (np.ones((3, 3), np.float32),),
            np.zeros(2, np.int64),
            ShapeError,
            r"parts\[0\] has shape \[3, 3\].*\[2, \*\]",
        ),
        (
            np.zeros((4, 3), np.float64),
            (np.ones((2, 3), np.float32),),
            np.zeros(2, np.int64),
            DtypeError,
            "cache has dtype float64.*float32 or int16",
        ),
        (
            np.zeros((4, 3), np.float32),
            (np.ones((2, 3), np.float64),),
            np.zeros(2, np.int64),
            DtypeError,
            r"parts\[0\] has dtype float64",
        ),
        (
            np.zeros((4, 3), np.float32),
            (np.ones((2, 3), np.float32),),
            np.zeros(2, np.int32),
            DtypeError,
            "slot_mapping has dtype int32",
        ),
    ],
)
def test_refusals_come_before_the_write(cache, parts, slots, error, said) -> None:
    with pytest.raises(error, match=said):
        write_cache(cache, parts, slots)
    assert (cache == 0).all()
