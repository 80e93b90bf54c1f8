"""Attention over selected slots, gathered and masked, against a loop over heads and keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.ops.arrays import Scratch
from fd_dsa.ops.mla import KeyLists, attend_dense, attend_gathered
from tests.reference.bfloat16 import ref_array, upper_half
from tests.reference.sparse_mla import ref_attend

SCALE, RANK, ROPE = 0.3, 6, 2
WIDTH = RANK + ROPE
TOLERANCE = 1e-5
CACHE_DTYPES = ["float32", "bfloat16"]
# what unused slots hold: one visible value would spoil everything
GARBAGE = [1e30, np.nan, np.inf, -np.inf]


class Latents:
    """Random latents in every slot that may be named, garbage in the rest."""

    def __init__(
        self, used: np.ndarray, num_slots: int, dtype: str = "float32", garbage: float = 1e30
    ) -> None:
        rows = np.random.default_rng(0).standard_normal((len(used), WIDTH)).astype(np.float32)
        self.cache = np.full((num_slots, WIDTH), garbage, np.float32)
        self.cache[used] = seen = rows if dtype == "float32" else ref_array(rows)
        if dtype != "float32":
            self.cache = upper_half(self.cache)
        self.by_slot = dict(zip(used.tolist(), seen, strict=True))

    def attend(self, q: np.ndarray, slots: list[int]) -> np.ndarray:
        """The oracle's output of one token."""
        return ref_attend(q, [self.by_slot[s] for s in slots], range(len(slots)), SCALE, RANK)


def queries(num_tokens: int, heads: int = 3, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (4 * rng.standard_normal((num_tokens, heads, WIDTH))).astype(np.float32)


def run_sparse(q: np.ndarray, cache: Any, indices: Any, scratch: Scratch | None = None) -> Any:
    return attend_gathered(
        paddle.to_tensor(q), cache, indices, softmax_scale=SCALE, kv_lora_rank=RANK, scratch=scratch
    )


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("topk", [1, 4, 9])
def test_selected_slots_of_ragged_rows(dtype: str, topk: int, garbage: float) -> None:
    rng = np.random.default_rng(topk)
    used = rng.permutation(50)[:20]
    latents, q = Latents(used, 50, dtype, garbage), queries(7)
    counts = [topk, 1, 0, topk, max(topk - 1, 0), 0, topk]
    chosen = [rng.permutation(used)[:n].tolist() for n in counts]
    indices = np.array([c + [-1] * (topk - len(c)) for c in chosen], np.int32)
    found = run_sparse(q, latents.cache, indices)
    wanted = np.array([latents.attend(q[t], c) for t, c in enumerate(chosen)])
    assert (found.shape, found.dtype) == ((7, 3, RANK), np.float32)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    assert (found[[2, 5]] == 0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_short_and_long_rows_with_holes(garbage: float) -> None:
    rng = np.random.default_rng(3)
    used = rng.permutation(900)[:600]
    latents, counts = Latents(used, 900, garbage=garbage), [0, 300, 1, 31, 32, 33, 0, 64, 65, 299]
    indices = np.full((len(counts), 310), -1, np.int32)
    chosen = [rng.permutation(used)[:count] for count in counts]
    for row, slots in zip(indices, chosen, strict=True):
        # the first entry is valid, later ones may have holes between them
        places = np.sort(rng.permutation(np.arange(1, len(slots) + 10))[: max(len(slots) - 1, 0)])
        row[[0, *places][: len(slots)]] = slots
    q = queries(len(counts))
    found = run_sparse(q, latents.cache, indices)
    wanted = np.array([latents.attend(q[t], c.tolist()) for t, c in enumerate(chosen)])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_a_long_row_leaves_the_short_ones_short() -> None:
    slots = np.full((64, 2048), -1, np.int32)
    slots[:, :20] = slots[7] = 3
    lists = KeyLists(slots)
    assert sorted(group.index.shape for group in lists.groups) == [(1, 2048), (63, 20)]


def test_no_tokens() -> None:
    latents = Latents(np.arange(3), 8)
    assert run_sparse(queries(0), latents.cache, np.zeros((0, 5), np.int32)).shape == (0, 3, RANK)


def test_scores_of_any_size_stay_finite() -> None:
    latents = Latents(np.arange(6), 6)
    found = run_sparse(
        1e4 * queries(2), latents.cache, np.tile(np.arange(6, dtype=np.int32), 2).reshape(2, 6)
    )
    wanted = [latents.attend(1e4 * q, list(range(6))) for q in queries(2).astype(np.float64)]
    np.testing.assert_allclose(found, np.array(wanted), rtol=0, atol=1e-2)
    assert np.isfinite(found).all()


def test_more_tokens_than_one_tile_gathers() -> None:
    # 8 values of 2,048 keys of 400 tokens are 26 million bytes, several budgets of a gather
    rng = np.random.default_rng(5)
    latents, q = Latents(np.arange(3000), 3000), queries(400, heads=2)
    indices = np.stack([rng.permutation(3000)[:2048] for _ in range(400)]).astype(np.int32)
    indices[::7, 5:] = -1
    scratch = Scratch()
    found = run_sparse(q, latents.cache, indices, scratch)
    for token in (0, 1, 7, 200, 382, 383, 384, 385, 398, 399):
        chosen = [s for s in indices[token].tolist() if s >= 0]
        np.testing.assert_allclose(
            found[token], latents.attend(q[token], chosen), rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_masked_and_gathered_agree_with_the_oracle(dtype: str) -> None:
    rng = np.random.default_rng(9)
    key_slots = rng.permutation(60)[:25].astype(np.int64)
    latents, q = Latents(key_slots, 60, dtype), queries(8)
    chosen = [np.sort(rng.permutation(25)[: n + 1]) for n in range(8)]
    mask = np.full((8, 25), -np.inf, np.float32)
    indices = np.full((8, 10), -1, np.int32)
    for t, columns in enumerate(chosen):
        mask[t, columns] = 0
        indices[t, : len(columns)] = key_slots[columns]
    masked = attend_dense(
        paddle.to_tensor(q), latents.cache, key_slots, mask, softmax_scale=SCALE, kv_lora_rank=RANK
    )
    wanted = [latents.attend(q[t], key_slots[c].tolist()) for t, c in enumerate(chosen)]
    np.testing.assert_allclose(masked, np.array(wanted), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(
        run_sparse(q, latents.cache, indices), np.array(wanted), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("poison", GARBAGE[1:])
def test_keys_that_the_mask_hides(poison: float) -> None:
    latents, q = Latents(np.arange(12), 12), queries(4)
    latents.cache[3] = poison
    key_slots, mask = np.array([7, 3, 9, 2]), np.zeros((4, 4), np.float32)
    mask[:, 1] = mask[2, 3] = -np.inf
    sizes = {"softmax_scale": SCALE, "kv_lora_rank": RANK}
    found = attend_dense(paddle.to_tensor(q), latents.cache, key_slots, mask, **sizes)
    seen = [[7, 9, 2], [7, 9, 2], [7, 9], [7, 9, 2]]
    wanted = [latents.attend(q[t], slots) for t, slots in enumerate(seen)]
    np.testing.assert_allclose(found, np.array(wanted), rtol=0, atol=TOLERANCE)
    # a token that selects it is not finite, by whatever it scores
    q[0], q[1] = 1.0, -1.0
    indices = np.tile(key_slots.astype(np.int32), (4, 1))
    mask = np.zeros((4, 4), np.float32)
    masked = attend_dense(paddle.to_tensor(q), latents.cache, key_slots, mask, **sizes)
    for result in (masked, run_sparse(q, latents.cache, indices)):
        assert not np.isfinite(result).any()
