"""Manifold-constrained hyper-connections: residual streams, mixed before and after each block.

A token has `hc_mult` residual streams [num_streams, hidden_size] instead of one. A block reads a
weighted sum of them, and its output is added to a mixture of them, by weights that each token
computes from its own streams.

Source: mHC (arXiv 2512.24880); Hugging Face transformers 5.23, models/deepseek_v4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.ops._norm import inverse_root

_ONE, _TWO = np.float32(1.0), np.float32(2.0)


class HyperConnection:
    """What a block reads from the streams, and how its output goes back.

    Args:
        config: the model.
        weights: make what is asked for.
        prefix: of the checkpoint's names.
    """

    def __init__(self, config: DeepseekV4Config, weights: Any, prefix: str) -> None:
        streams, width = config.hc_mult, config.hc_mult * config.hidden_size
        mixes = (2 + streams) * streams
        self._streams, self._norm_eps = streams, config.rms_norm_eps
        self._eps, self._iterations = np.float32(config.hc_eps), config.hc_sinkhorn_iters
        self._fn = weights.matrix(width, {f"{prefix}fn": mixes}, sums_in_float32=True)
        self._base = weights.vector({f"{prefix}base": mixes})
        self._scale = weights.vector({f"{prefix}scale": 3})
        self._parts = np.repeat(np.arange(3), (streams, streams, streams * streams))

    def read(self, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Input of the block, and the weights with which `expand` adds its output.

        Args:
            streams: float32 [num_tokens, num_streams, hidden_size].

        Returns:
            float32 [num_tokens, hidden_size]; [num_tokens, num_streams, 1]; and
            [num_tokens, num_streams, num_streams], from each stream (column) to each (row).
        """
        n = self._streams
        mixed = _mixes(streams, self._fn, self._norm_eps)
        mixed *= self._scale[self._parts]
        mixed += self._base
        gates = sigmoid(mixed[:, : 2 * n])
        gates[:, :n] += self._eps
        gates[:, n:] *= _TWO
        comb = self._doubly_stochastic(mixed[:, 2 * n :])
        return _weighted(gates[:, :n], streams), gates[:, n:, None], comb

    @staticmethod
    def expand(
        output: np.ndarray, streams: np.ndarray, post: np.ndarray, comb: np.ndarray
    ) -> np.ndarray:
        """The streams after a block: its output [num_tokens, hidden_size] plus their mixture."""
        mixed = np.matmul(comb, streams)
        mixed += post * output[:, None, :]
        return mixed

    def _doubly_stochastic(self, logits: np.ndarray) -> np.ndarray:
        """Softmax of the rows, then Sinkhorn: columns first, then rows and columns alternately.

        Args:
            logits: float32 [num_tokens, num_streams ** 2].

        Returns:
            float32 [num_tokens, num_streams, num_streams], transposed.
        """
        n, eps = self._streams, self._eps
        # tokens along the last axis: every operation runs over all of them
        a = np.ascontiguousarray(logits.T).reshape(n, n, -1)
        a -= a.max(axis=1, keepdims=True)
        np.exp(a, out=a)
        a /= np.add.reduce(a, axis=1, keepdims=True)
        a += eps
        a /= np.add.reduce(a, axis=0, keepdims=True) + eps
        for _ in range(self._iterations - 1):
            for axis in (1, 0):
                sums = np.add.reduce(a, axis=axis, keepdims=True)
                # not as `initial`, whose place in the sum depends on the number of tokens
                sums += eps
                a /= sums
        return np.ascontiguousarray(a.transpose(2, 1, 0))


class HeadCollapse:
    """The weighted sum of all streams that the head reads.

    Args:
        config: the model.
        weights: make what is asked for.
        prefix: of the checkpoint's names.
    """

    def __init__(self, config: DeepseekV4Config, weights: Any, prefix: str) -> None:
        streams, width = config.hc_mult, config.hc_mult * config.hidden_size
        self._norm_eps, self._eps = config.rms_norm_eps, np.float32(config.hc_eps)
        self._fn = weights.matrix(width, {f"{prefix}fn": streams}, sums_in_float32=True)
        self._base = weights.vector({f"{prefix}base": streams})
        self._scale = weights.vector({f"{prefix}scale": 1})

    def of(self, streams: np.ndarray) -> np.ndarray:
        """float32 [num_tokens, hidden_size] of [num_tokens, num_streams, hidden_size]."""
        mixed = _mixes(streams, self._fn, self._norm_eps)
        mixed *= self._scale
        mixed += self._base
        return _weighted(sigmoid(mixed) + self._eps, streams)


def _mixes(streams: np.ndarray, fn: Any, epsilon: float) -> np.ndarray:
    """rms(z) times `fn` of each token's streams z, end to end: float32 [num_tokens, mixes]."""
    flat = streams.reshape(len(streams), -1)
    mixed: np.ndarray = fn.times(flat)
    mixed *= inverse_root(flat, epsilon)
    return mixed


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), a new array."""
    with np.errstate(over="ignore"):
        out = np.exp(-x)
    out += _ONE
    return np.divide(_ONE, out, out=out)


def _weighted(weights: np.ndarray, streams: np.ndarray) -> np.ndarray:
    """Each token's sum of its streams, by weights [num_tokens, num_streams]."""
    return np.matmul(weights[:, None, :], streams)[:, 0]
