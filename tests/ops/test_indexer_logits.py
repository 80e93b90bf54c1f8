"""Indexer scores against a loop over heads, gathered by slot and paged by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.ops.arrays import Scratch
from fd_dsa.ops.logits import host_scores
from fd_dsa.ops.logits.host_scores import PagedUnits, score_gathered, score_paged
from tests.reference.bfloat16 import ref_array, upper_half
from tests.reference.indexer import ref_score
from tests.reference.topk import ref_slot

CACHE_DTYPES = {"float32": np.float32, "bfloat16": np.int16}
NAN_BITS = {np.float32: np.nan, np.int16: 0x7FC1}
RELATIVE = 1e-6


def assert_scores(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal but for the rounding of a float32 sum."""
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=RELATIVE * np.abs(wanted).max())


def stored(values: np.ndarray, dtype: type) -> np.ndarray:
    """Values that a cache of `dtype` can hold, as it holds them."""
    return values if dtype == np.float32 else upper_half(values)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_scores_of_gathered_keys(dtype: str) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((5, 3, 8)).astype(np.float32)
    weights = rng.standard_normal((5, 3)).astype(np.float32)
    keys = rng.standard_normal((11, 8)).astype(np.float32)
    slots = rng.permutation(40)[:11].astype(np.int64)
    cache = np.full((40, 8), NAN_BITS[CACHE_DTYPES[dtype]], CACHE_DTYPES[dtype])
    seen = keys if dtype == "float32" else ref_array(keys)
    cache[slots] = stored(seen, CACHE_DTYPES[dtype])
    cache = cache.reshape(8, 5, 8)
    found = score_gathered(paddle.to_tensor(q), paddle.to_tensor(weights), cache, slots)
    wanted = [[ref_score(q[t], weights[t], key) for key in seen] for t in range(5)]
    assert_scores(found, np.array(wanted))


@pytest.mark.parametrize("tile_bytes", [1, 4 * 15 * 4, 1 << 20])
def test_memory_for_scores_is_bounded_and_changes_none(
    monkeypatch: pytest.MonkeyPatch, tile_bytes: int
) -> None:
    rng = np.random.default_rng(2)
    q = paddle.to_tensor(rng.standard_normal((5, 3, 8)).astype(np.float32))
    weights = paddle.to_tensor(rng.standard_normal((5, 3)).astype(np.float32))
    cache = rng.standard_normal((4, 5, 8)).astype(np.float32)
    slots = rng.permutation(20).astype(np.int64)
    wanted = score_gathered(q, weights, cache, slots).copy()
    monkeypatch.setattr(host_scores, "TILE_BYTES", tile_bytes)
    scratch = Scratch()
    assert_scores(score_gathered(q, weights, cache, slots, scratch), wanted)
    keys_at_once = scratch.take("indexer_keys", (0,)).base.size // 8
    assert keys_at_once == {1: 1, 240: 4, 1 << 20: 20}[tile_bytes]


def test_a_key_that_no_head_likes_scores_exactly_zero() -> None:
    q = np.ones((1, 2, 4), np.float32)
    keys = np.array([[-1.0] * 4, [1.0] * 4], np.float32)
    found = score_gathered(
        paddle.to_tensor(q), paddle.to_tensor(np.float32([[-2.0, -3.0]])), keys[None], np.arange(2)
    )
    # a weight may be negative: a key that a head likes then scores below one that none likes
    assert found.tolist() == [[0.0, -20.0]]


def test_a_nan_key_spoils_its_own_column_only() -> None:
    rng = np.random.default_rng(1)
    q = paddle.to_tensor(rng.standard_normal((3, 4, 8)).astype(np.float32))
    weights = paddle.to_tensor(rng.standard_normal((3, 4)).astype(np.float32))
    keys = rng.standard_normal((6, 8)).astype(np.float32)
    clean = score_gathered(q, weights, keys[None], np.arange(6)).copy()
    keys[2] = np.nan
    found = score_gathered(q, weights, keys[None], np.arange(6))
    assert np.isnan(found[:, 2]).all()
    np.testing.assert_array_equal(np.delete(found, 2, 1), np.delete(clean, 2, 1))


class PagedCase:
    """Decode rows of the given lengths over shuffled blocks; all memory they do not own is NaN."""

    def __init__(
        self, lengths: list[int], queries: int, block_size: int, dtype: type, dim: int = 8
    ) -> None:
        rng = np.random.default_rng(len(lengths) * 1000 + block_size)
        self.lengths, self.block_size = lengths, block_size
        rows = len(lengths)
        needed = [-(-n // block_size) for n in lengths]
        num_blocks = sum(needed) + 2
        free = rng.permutation(np.arange(1, num_blocks))
        self.tables = np.full((rows, max(needed) + 1), -1, np.int32)
        for row, count in enumerate(needed):
            self.tables[row, :count], free = free[:count], free[count:]
        self.round: Any = ref_array if dtype == np.int16 else np.asarray
        self.keys = [rng.standard_normal((n, dim)).astype(np.float32) for n in lengths]
        cache = np.full((num_blocks * block_size, dim), NAN_BITS[dtype], dtype)
        for row, n in enumerate(lengths):
            slots = [ref_slot(p, self.tables[row], block_size) for p in range(n)]
            cache[slots] = stored(self.round(self.keys[row]), dtype)
        self.cache = cache.reshape(num_blocks, block_size, dim)
        self.q = rng.standard_normal((rows, queries, 3, dim)).astype(np.float32)
        self.weights = rng.standard_normal((rows, queries, 3)).astype(np.float32)

    def run(self, scratch: Scratch | None = None) -> np.ndarray:
        units = PagedUnits.build(np.array(self.lengths), self.tables, self.block_size)
        return score_paged(
            paddle.to_tensor(self.q), paddle.to_tensor(self.weights), self.cache, units, scratch
        )

    def check(self, found: np.ndarray) -> None:
        for row, n in enumerate(self.lengths):
            seen = self.round(self.keys[row])
            for j in range(self.q.shape[1]):
                wanted = [ref_score(self.q[row, j], self.weights[row, j], key) for key in seen]
                assert_scores(found[row, j, :n], np.array(wanted))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("block_size", [1, 16, 64, 300])
@pytest.mark.parametrize("queries", [1, 3])
def test_scores_of_ragged_rows(dtype: str, block_size: int, queries: int) -> None:
    case = PagedCase([1, 257, 64, 300, 255, 256, 63], queries, block_size, CACHE_DTYPES[dtype])
    found = case.run()
    assert found.shape[:2] == (7, queries)
    assert found.shape[2] >= 300
    case.check(found)


def test_scratch_that_a_larger_step_filled() -> None:
    scratch = Scratch()
    for array in (PagedCase([700, 650], 2, 16, np.float32), PagedCase([3, 17], 1, 16, np.float32)):
        array.check(array.run(scratch))


def test_more_units_than_one_tile_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    # 14 units of 256 keys of 8 values, 4 of them gathered at once
    monkeypatch.setattr(host_scores, "TILE_BYTES", 4 * 256 * 8 * 4)
    case = PagedCase([1200, 1, 1200, 700], 1, 64, np.int16)
    scratch = Scratch()
    case.check(case.run(scratch))
    assert scratch.take("indexer_keys", (0,)).base.size == 4 * 256 * 8


def test_units_cover_each_row_once_and_in_order() -> None:
    tables = np.array([[5, 9, 2, -1], [7, -1, -1, -1]], np.int32)
    units = PagedUnits.build(np.array([300, 128]), tables, 128)
    assert units.row.tolist() == [0, 0, 1]
    assert units.column.tolist() == [0, 1, 0]
    # the last unit of a row names block 0 where the row has ended
    assert units.blocks.tolist() == [[5, 9], [2, 0], [7, 0]]
    assert (units.num_rows, units.width) == (2, 512)
