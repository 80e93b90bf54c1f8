"""Figures of a selection: cases made by hand, and random ones against oracles in loops."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.accuracy.selection.measure import (
    dense_attention,
    exactness,
    index_scores,
    mass_recall,
)
from tests.reference.indexer import ref_score
from tests.reference.sparse_mla import ref_softmax
from tests.reference.topk import ref_topk

# two heads, four keys
ATTENTION = np.array([[0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.25, 0.25]], np.float32)


@pytest.mark.parametrize(
    ("selected", "wanted"),
    [([0, 1, 2, 3], 1.0), ([], 0.0), ([0], 0.35), ([1, 3], (0.2 + 0.75) / 2)],
)
def test_mass_recall_is_the_mean_over_heads(selected: list[int], wanted: float) -> None:
    assert mass_recall(ATTENTION, np.array(selected, np.int64)) == pytest.approx(wanted)


def test_dense_attention_is_the_softmax_of_the_oracle() -> None:
    rng = np.random.default_rng(2)
    query = rng.standard_normal((3, 10)).astype(np.float32)
    keys = rng.standard_normal((17, 10)).astype(np.float32)
    found = dense_attention(query, keys, 0.3)
    for head, row in zip(query, found, strict=True):
        wanted = ref_softmax([0.3 * float(head.astype(np.float64) @ key) for key in keys])
        np.testing.assert_allclose(row, wanted, rtol=1e-5)


def test_index_scores_are_those_of_the_oracle() -> None:
    rng = np.random.default_rng(3)
    query, weights = rng.standard_normal((4, 6)), rng.standard_normal(4)
    keys = rng.standard_normal((11, 6))
    single = [array.astype(np.float32) for array in (query, weights, keys)]
    wanted = [ref_score(query, weights, key) for key in keys]
    np.testing.assert_allclose(index_scores(*single), wanted, rtol=0, atol=1e-5)


SCORES = np.array([5, 1, 4, 4, 0, 3], np.float32)
CLOSE = np.array([1.0, 1.0 - 1e-7, 0.5], np.float32)


@pytest.mark.parametrize(
    ("selected", "scores", "k", "wanted"),
    [
        # a tie counts, a worse key does not
        ([0, 3], SCORES, 2, 1.0),
        ([0, 1], SCORES, 2, 0.5),
        ([4, 1], SCORES, 2, 0.0),
        # a key that is missing
        ([0], SCORES, 2, 0.5),
        # within rounding
        ([1], CLOSE, 1, 1.0),
        ([2], CLOSE, 1, 0.0),
        *(([p for p in ref_topk(SCORES, 6, k) if p >= 0], SCORES, k, 1.0) for k in range(1, 9)),
    ],
)
def test_exactness_is_the_share_of_the_best(
    selected: list[int], scores: np.ndarray, k: int, wanted: float
) -> None:
    assert exactness(np.array(selected), scores, k) == wanted
