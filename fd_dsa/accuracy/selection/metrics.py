"""Figures of a selection against dense attention over the same activations, in NumPy.

Everything here is of one query token: it sees the keys at positions 0 to n - 1, its own the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# scores of two implementations of one formula in float32, relative to the largest of the row
_SCORE_TOLERANCE = 1e-5


def dense_attention(query: np.ndarray, keys: np.ndarray, softmax_scale: float) -> np.ndarray:
    """float32 [num_heads, n]: softmax over all keys.

    Args:
        query: float32 [num_heads, width]; absorbed query of the token.
        keys: float32 [n, width]; latents and rotary keys that it sees.
        softmax_scale: factor of the scores.
    """
    scores = (query @ keys.T) * np.float32(softmax_scale)
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True, dtype=np.float32)
    return scores


def mass_recall(attention: np.ndarray, selected: np.ndarray) -> float:
    """Share of dense attention that falls on the selected keys, mean over heads.

    Args:
        attention: float32 [num_heads, n], of `dense_attention`.
        selected: int [m]; distinct positions below n.
    """
    return float(attention[:, selected].sum(axis=1, dtype=np.float64).mean())


def needle_recall(selected: np.ndarray, needle: Sequence[int]) -> float:
    """Share of the needle's positions that are selected (recall@k).

    Args:
        selected: int [m]; distinct positions.
        needle: at least one position.
    """
    return float(np.isin(np.asarray(needle), selected).mean())


def strongest_head(attention: np.ndarray, needle: Sequence[int]) -> float:
    """Attention that the head which looks at the needle most gives to it.

    Args:
        attention: float32 [num_heads, n], of `dense_attention`.
        needle: at least one position below n.
    """
    return float(attention[:, np.asarray(needle)].sum(axis=1, dtype=np.float64).max())


def last_keys(num_keys: int, k: int) -> np.ndarray:
    """int64: the last k of `num_keys` positions: what a selector without an eye for content has."""
    return np.arange(max(0, num_keys - k), num_keys)


def random_keys(num_keys: int, k: int, generator: np.random.Generator) -> np.ndarray:
    """int64, ascending: k of `num_keys` positions, each set equally likely."""
    return np.sort(generator.permutation(num_keys)[:k])


def index_scores(query: np.ndarray, weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """float32 [n]: sum_h weights[h] * max(query[h] . keys[s], 0), the indexer's score of each key.

    Args:
        query: float32 [index_n_heads, index_head_dim].
        weights: float32 [index_n_heads]; all scale factors folded in.
        keys: float32 [n, index_head_dim]; their scales multiplied in.

    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2, eq. 1.
    """
    return weights @ np.maximum(query @ keys.T, np.float32(0))


def exactness(selected: np.ndarray, scores: np.ndarray, k: int) -> float:
    """Share of the k best keys that a selection holds, or others that score as well.

    A key counts if its score is within rounding of the k-th best one: where two keys are that
    near, another order of adding chooses the other.

    Args:
        selected: int [m]; distinct positions below n.
        scores: float32 [n], of `index_scores`.
        k: keys to choose, of which there are n at most.
    """
    k = min(k, len(scores))
    last = np.partition(scores, -k)[-k]
    allowed = last - _SCORE_TOLERANCE * np.abs(scores).max()
    good = np.count_nonzero(scores[selected] >= allowed)
    return good / k
