"""Top-k against a sort of every row, and the translation of positions to cache slots."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.ops.key_bounds import positions_to_slots
from fd_dsa.ops.topk import select_positions
from tests.reference.topk import ref_slot, ref_topk

NEGATIVE_NAN = np.uint32(0xFFC00000).view(np.float32)
SMALLEST = np.uint32(1).view(np.float32)
SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")),
    *(float(SMALLEST), -float(SMALLEST), 3.4e38, -3.4e38),
]


def check(scores: np.ndarray, lengths: list[int], k: int) -> np.ndarray:
    """Compare with the oracle row by row, and return the result."""
    before = scores.tobytes()
    found = select_positions(scores, np.array(lengths, np.int32), k)
    assert scores.tobytes() == before
    wanted = [ref_topk(row, n, k) for row, n in zip(scores, lengths, strict=True)]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.array(wanted, np.int32).reshape(len(lengths), k))
    return found


@st.composite
def score_rows(draw: st.DrawFn) -> tuple[np.ndarray, list[int], int]:
    """Scores full of ties and special values, lengths up to the width, any k."""
    width = draw(st.integers(1, 20))
    value = st.one_of(st.sampled_from(SPECIAL), st.integers(-2, 2).map(float), st.floats(width=32))
    rows = draw(st.lists(st.lists(value, min_size=width, max_size=width), min_size=1, max_size=4))
    lengths = draw(st.lists(st.integers(0, width), min_size=len(rows), max_size=len(rows)))
    return np.array(rows, np.float32), lengths, draw(st.integers(1, 24))


@given(score_rows())
@settings(max_examples=150)
def test_set_and_order_of_any_row(case: tuple[np.ndarray, list[int], int]) -> None:
    check(*case)


@given(score_rows(), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_columns_past_the_length_are_not_looked_at(
    case: tuple[np.ndarray, list[int], int], seed: int
) -> None:
    scores, lengths, k = case
    wanted = check(scores, lengths, k)
    garbage = np.random.default_rng(seed).choice(np.float32([np.nan, np.inf, 9e9]), scores.shape)
    past = np.arange(scores.shape[1])[None, :] >= np.array(lengths)[:, None]
    found = select_positions(np.where(past, garbage, scores), np.array(lengths, np.int64), k)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("k", [1, 2, 8, 64])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_lengths_around_k(k: int, extra: int) -> None:
    rng = np.random.default_rng(k)
    scores = rng.standard_normal((5, k + 5)).astype(np.float32)
    found = check(scores, [max(k + extra, 0)] * 5, k)
    # a row with at most k keys is their plain list
    if extra <= 0:
        assert (found[:, : k + extra] == np.arange(k + extra)).all()
        assert (found[:, k + extra :] == -1).all()


PLATEAU = [-1.0] * 40
PLATEAU[5::3] = [0.0, -0.0] * 6
PLATEAU[39] = 2.0
NUMBERS_AND_NAN = [np.nan, -np.inf, NEGATIVE_NAN, -np.inf, -5.0]


@pytest.mark.parametrize(
    ("row", "length", "k", "wanted"),
    [
        ([5.0, 9.0], 0, 2, [-1, -1]),
        ([5.0, 9.0], 1, 2, [0, -1]),
        ([3.0, 7.0], 2, 5, [0, 1, -1, -1, -1]),
        # zeros of either sign go to the lowest positions
        (PLATEAU, 40, 4, [5, 8, 11, 39]),
        # NaN of either sign fills only what numbers leave
        (NUMBERS_AND_NAN, 5, 3, [1, 3, 4]),
        (NUMBERS_AND_NAN, 5, 4, [0, 1, 3, 4]),
        ([3.4e38, np.nan, np.inf], 3, 1, [2]),
    ],
)
def test_rows_by_hand(row: list[float], length: int, k: int, wanted: list[int]) -> None:
    assert check(np.array([row], np.float32), [length], k).tolist() == [wanted]


def test_wide_rows_of_few_values() -> None:
    rng = np.random.default_rng(3)
    scores = rng.integers(-3, 3, (6, 3000)).astype(np.float32)
    check(scores, [3000, 2999, 2049, 2048, 2047, 700], 2048)


def test_no_rows_and_no_columns() -> None:
    assert select_positions(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), 3).shape == (0, 3)
    none = select_positions(np.zeros((2, 0), np.float32), np.zeros(2, np.int32), 3)
    assert none.tolist() == [[-1] * 3] * 2


def test_tensors_and_strided_arrays_give_the_same() -> None:
    scores = np.random.default_rng(0).integers(-2, 3, (6, 9)).astype(np.float32)
    lengths = np.array([9, 8, 7, 3, 1, 0], np.int32)
    wanted = select_positions(scores, lengths, 4)
    np.testing.assert_array_equal(
        select_positions(paddle.to_tensor(scores), paddle.to_tensor(lengths), 4), wanted
    )
    np.testing.assert_array_equal(select_positions(np.asfortranarray(scores), lengths, 4), wanted)


@given(
    st.sampled_from([1, 16, 64]),
    st.lists(st.lists(st.integers(-1, 127), min_size=3, max_size=3), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=100)
def test_slots_of_positions(block_size: int, positions: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, 1000, (4, -(-128 // block_size))).astype(np.int32)
    rows = rng.integers(0, 4, len(positions))
    found = positions_to_slots(np.array(positions, np.int32), rows, tables, block_size)
    wanted = [
        [ref_slot(p, tables[row], block_size) for p in line]
        for row, line in zip(rows, positions, strict=True)
    ]
    assert found.dtype == np.int32
    assert found.tolist() == wanted


def test_rows_past_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(5).standard_normal((7, 50)).astype(np.float32)
    lengths = np.array([50, 3, 0, 50, 20, 1, 49])
    whole = select_positions(scores, lengths, 6)
    monkeypatch.setattr("fd_dsa.ops.topk.TILE_KEYS", 110)
    np.testing.assert_array_equal(select_positions(scores, lengths, 6), whole)


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF8000FF], ids=["+", "-"])
def test_signalling_nan_past_the_length(bits: int) -> None:
    # columns that no unit wrote hold what the memory held
    scores = np.full((2, 4), bits, np.uint32).view(np.float32)
    scores[:, :2] = [[1.0, 3.0], [2.0, -1.0]]
    assert select_positions(scores, np.array([2, 2]), 1).tolist() == [[1], [0]]
