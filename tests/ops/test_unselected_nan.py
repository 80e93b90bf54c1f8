"""NaN and infinities in slots that nobody selected reach no result and raise no warning."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fd_dsa.ops.mla.paddle_impl import attend_dense, attend_gathered
from fd_dsa.ops.topk.paddle_impl import select_positions
from tests.reference.sparse_mla import ref_attend

SCALE, RANK, WIDTH = 0.3, 6, 8
TOLERANCE = 1e-5
POISONS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def inputs(poison: float, slot: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries of 4 tokens, and 12 latents of which one is poisoned."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((4, 2, WIDTH)).astype(np.float32)
    latents = rng.standard_normal((12, WIDTH)).astype(np.float32)
    latents[slot] = poison
    return q, latents


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
@pytest.mark.parametrize("slot", [0, 5, 11])
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_gathered(poison: float, slot: int, dtype: type) -> None:
    q, latents = inputs(poison, slot)
    if dtype == np.int16:
        latents = (latents.view(np.uint32) & 0xFFFF0000).view(np.float32)
    cache = latents if dtype == np.float32 else (latents.view(np.uint32) >> 16).astype(np.int16)
    chosen = [[3, 7, 9, 2], [4, 1], [10], []]
    indices = np.array([c + [-1] * (4 - len(c)) for c in chosen], np.int32)
    found = attend_gathered(
        paddle.to_tensor(q), cache, indices, softmax_scale=SCALE, kv_lora_rank=RANK
    )
    wanted = [ref_attend(q[t], latents, c, SCALE, RANK) for t, c in enumerate(chosen)]
    np.testing.assert_allclose(found, np.array(wanted), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF8000FF], ids=["+", "-"])
def test_signalling_nan_past_the_length(bits: int) -> None:
    # columns that no unit wrote hold what the memory held
    scores = np.full((2, 4), bits, np.uint32).view(np.float32)
    scores[:, :2] = [[1.0, 3.0], [2.0, -1.0]]
    assert select_positions(scores, np.array([2, 2]), 1).tolist() == [[1], [0]]


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_masked(poison: float) -> None:
    q, latents = inputs(poison, 3)
    key_slots = np.array([7, 3, 9, 2])
    mask = np.zeros((4, 4), np.float32)
    mask[:, 1] = -np.inf
    mask[2, 3] = -np.inf
    found = attend_dense(
        paddle.to_tensor(q), latents, key_slots, mask, softmax_scale=SCALE, kv_lora_rank=RANK
    )
    seen = [[7, 9, 2], [7, 9, 2], [7, 9], [7, 9, 2]]
    wanted = [ref_attend(q[t], latents, c, SCALE, RANK) for t, c in enumerate(seen)]
    np.testing.assert_allclose(found, np.array(wanted), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_a_token_that_selects_it_is_not_finite(poison: float) -> None:
    q, latents = inputs(poison, 3)
    # scores of +inf, -inf and NaN
    q[0], q[1] = 1.0, -1.0
    slots = np.array([7, 3, 9])
    sizes = {"softmax_scale": SCALE, "kv_lora_rank": RANK}
    indices = np.tile(slots.astype(np.int32), (4, 1))
    gathered = attend_gathered(paddle.to_tensor(q), latents, indices, **sizes)
    mask = np.zeros((4, 3), np.float32)
    masked = attend_dense(paddle.to_tensor(q), latents, slots, mask, **sizes)
    for found in (gathered, masked):
        assert not np.isfinite(found).any()
