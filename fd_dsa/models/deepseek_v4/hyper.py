"""Manifold-constrained hyper-connections: residual streams and their mixing.

A token has `hc_mult` residual streams [num_streams, hidden_size] instead of one. A block reads a
weighted sum of them, and its output is added to a mixture of them. Each token computes the weights
from its own streams.

Source: mHC (arXiv 2512.24880); Hugging Face transformers 5.23, models/deepseek_v4.
"""

from __future__ import annotations

import numpy as np

from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.deepseek_v4.norm import length
from fd_dsa.models.moe import sigmoid
from fd_dsa.models.weights_protocol import HostOnlyWeights
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.host_gemm import HostMatrix

# max tokens for which sums are repeated
_MANY = 128
_TWO = np.float32(2.0)


class HyperConnection:
    """Connection of a block: reads its input from streams and adds its output."""

    def __init__(self, config: DeepseekV4Config, weights: HostOnlyWeights, prefix: str) -> None:
        streams, width = config.hc_mult, config.hc_mult * config.hidden_size
        mixes = (2 + streams) * streams
        self._streams, self._norm_eps = streams, config.rms_norm_eps
        self._eps, self._iterations = np.float32(config.hc_eps), config.hc_sinkhorn_iters
        self._fn = weights.matrix(width, {f"{prefix}fn": mixes}, sums_in_float32=True)
        self._base = weights.vector({f"{prefix}base": mixes})
        self._scale = weights.vector({f"{prefix}scale": 3}, factor=width**0.5)
        self._parts = np.repeat(np.arange(3), (streams, streams, streams * streams))
        self._adders = None if fixed_order() else _adders(streams, self._eps)

    def read(self, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the input of the block, and the mixture for `expand`.

        Args:
            streams: float32 [num_tokens, num_streams, hidden_size].

        Returns:
            float32 [num_tokens, hidden_size]; and [num_tokens, num_streams, num_streams + 1], from
            each stream (column) and from the block's output (last column) to each stream (row).
        """
        n = self._streams
        mixed = _mixes(streams, self._fn, self._scale.take(self._parts), self._norm_eps)
        mixed += self._base
        gates = sigmoid(mixed[:, : 2 * n])
        gates[:, :n] += self._eps
        gates[:, n:] *= _TWO
        mixture = np.empty((len(streams), n, n + 1), np.float32)
        mixture[:, :, :n] = self._doubly_stochastic(mixed[:, 2 * n :])
        mixture[:, :, n] = gates[:, n:]
        return _weighted(gates[:, :n], streams), mixture

    @staticmethod
    def expand(output: np.ndarray, residual: np.ndarray, mixture: np.ndarray) -> np.ndarray:
        """Return the residual after a block.

        Args:
            output: float32 [num_tokens, hidden_size], output of the block.
            residual: float32 [num_tokens, num_streams + 1, hidden_size]. The last row is free.
            mixture: mixture of `read`.

        Returns:
            The shape of `residual`.
        """
        residual[:, -1] = output
        mixed = np.empty_like(residual)
        np.matmul(mixture, residual, out=mixed[:, :-1])
        return mixed

    def _doubly_stochastic(self, logits: np.ndarray) -> np.ndarray:
        """Normalise matrices by a softmax of the rows, then Sinkhorn from the columns on.

        Args:
            logits: float32 [num_tokens, num_streams ** 2].

        Returns:
            float32 [num_tokens, num_streams, num_streams], transposed.
        """
        n, eps = self._streams, self._eps
        # tokens are along the last axis, so that every operation runs over all of them
        padded = np.ones((n * n + 1, len(logits)), np.float32)
        flat = padded[:-1]
        flat[...] = logits.T
        a = flat.reshape(n, n, -1)
        a -= a.max(axis=1, keepdims=True)
        np.exp(a, out=a)
        a /= np.add.reduce(a, axis=1, keepdims=True)
        a += eps
        axes = (0, *(1, 0) * (self._iterations - 1))
        if self._adders is None:
            for axis in axes:
                # one order of sums. eps is not `initial`, which is added in another place
                a /= np.add.reduce(a, axis=axis, keepdims=True) + eps
            return a.transpose(2, 1, 0)
        # few tokens repeat a sum at each place that it divides
        repeats = 1 if len(logits) > _MANY else n
        sums = np.empty((n * repeats, len(logits)), np.float32)
        divided, divisors = flat, (sums, sums)
        if repeats == 1:
            divided, divisors = a, (sums[None], sums[:, None])
        add, divide = [adder.dot for adder in self._adders[repeats]], np.divide
        for axis in axes:
            add[axis](padded, sums)
            divide(divided, divisors[axis], divided)
        return a.transpose(2, 1, 0)


def _adders(n: int, eps: np.float32) -> dict[int, list[np.ndarray]]:
    """Return matrices that sum an [n, n] matrix per axis, for 1 and n repeats.

    Each is float32 [n * repeats, n * n + 1]. Times the [n, n] matrix end to end and a last 1, it
    gives the sums plus eps, repeated. One GEMM is faster than a reduction of small matrices.
    """
    eye, made = np.eye(n), {}
    for repeats in (1, n):
        adders = np.full((2, n * repeats, n * n + 1), eps, np.float32)
        adders[0, :, :-1] = np.kron(np.ones((repeats, n)), eye)
        adders[1, :, :-1] = np.kron(eye, np.ones((repeats, n)))
        made[repeats] = list(adders)
    return made


class HeadCollapse:
    """Weighted sum of all streams, the input of the head.

    Attributes:
        num_streams: number of streams of a token.
    """

    def __init__(self, config: DeepseekV4Config, weights: HostOnlyWeights, prefix: str) -> None:
        streams, width = config.hc_mult, config.hc_mult * config.hidden_size
        self.num_streams = streams
        self._norm_eps, self._eps = config.rms_norm_eps, np.float32(config.hc_eps)
        self._fn = weights.matrix(width, {f"{prefix}fn": streams}, sums_in_float32=True)
        self._base = weights.vector({f"{prefix}base": streams})
        self._scale = weights.vector({f"{prefix}scale": 1}, factor=width**0.5)

    def weighted_sum(self, streams: np.ndarray) -> np.ndarray:
        """Sum [num_tokens, num_streams, hidden_size] to [num_tokens, hidden_size]."""
        mixed = _mixes(streams, self._fn, self._scale, self._norm_eps)
        mixed += self._base
        return _weighted(sigmoid(mixed) + self._eps, streams)


def _mixes(streams: np.ndarray, fn: HostMatrix, scale: np.ndarray, epsilon: float) -> np.ndarray:
    """Return `fn` of streams z / length(z), times `scale`: [num_tokens, mixes]."""
    flat = streams.reshape(-1, streams.shape[1] * streams.shape[2])
    mixed: np.ndarray = fn.matmul(flat)
    mixed *= scale / length(flat, epsilon)
    return mixed


def _weighted(weights: np.ndarray, streams: np.ndarray) -> np.ndarray:
    """Return each token's sum of its streams, by weights [num_tokens, num_streams]."""
    return np.matmul(weights[:, None, :], streams)[:, 0]
