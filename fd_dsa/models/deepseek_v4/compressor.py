"""Learned pooling of sources into entries in a CSA or an HCA layer.

A layer projects each token to a *source*: a value and a gate for every channel. An entry is the
gated mean of a few neighbouring sources, normed and rotated. A source of a CSA layer has two
halves. The first half counts for the next entry, the second half for the token's own entry.
Channels of the indexer's compressor follow those of the main one, so that both are pooled at once.
"""

from __future__ import annotations

import numpy as np

from fd_dsa.models.deepseek_v4.config import CSA, DeepseekV4Config
from fd_dsa.models.deepseek_v4.norm import RowNorm
from fd_dsa.models.deepseek_v4.rotation import Rotation, rotate
from fd_dsa.models.weights_protocol import HostOnlyWeights


class Compressor:
    """Compressor of a layer, which makes its entries.

    Attributes:
        halves: number of halves of a source.
        width: channels of a half: `head_dim`, in CSA followed by `index_head_dim`.
        names: for each compressor the prefix of its weights, its first channel in a half, and its
            number of channels.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        kind: str,
        weights: HostOnlyWeights,
        prefix: str,
        rotation: Rotation,
    ) -> None:
        self.halves = 2 if kind == CSA else 1
        self._ratio, self._rotation = config.compress_rates[kind], rotation
        self._rope_dim = config.qk_rope_head_dim
        self.names = [(f"{prefix}compressor.", 0, config.head_dim)]
        if kind == CSA:
            more = f"{prefix}indexer.compressor.", config.head_dim, config.index_head_dim
            self.names.append(more)
        self.width = sum(width for *_, width in self.names)
        self._norms = []
        self._gates = np.empty((self._ratio, self.halves, self.width), np.float32)
        for name, first, width in self.names:
            weights.fills(f"{name}ape", self._gates[:, :, first : first + width])
            self._norms.append(RowNorm(weights, f"{name}norm.weight", width, config.rms_norm_eps))

    def places(self, first_column: int) -> dict[str, list[tuple[int, int]]]:
        """Return the output columns of each projection, such that sources are views.

        A token's columns from `first_column` on are then [halves, 2, width]: values, then gates.
        """
        found = {}
        for name, first, width in self.names:
            for part, projection in enumerate(("wkv", "wgate")):
                start = first_column + part * self.width + first
                found[f"{name}{projection}.weight"] = [
                    (start + 2 * half * self.width, width) for half in range(self.halves)
                ]
        return found

    def add_gates(self, sources: np.ndarray, positions: np.ndarray) -> None:
        """Add a learned bias to the gates, by the place of each token in its entry.

        Args:
            sources: float32 [num_tokens, halves, 2, width], changed in place.
            positions: int [num_tokens].
        """
        gates = sources[:, :, 1]
        gates += self._gates.take(positions % self._ratio, axis=0)

    def entries(self, pooled: np.ndarray, positions: np.ndarray) -> list[np.ndarray]:
        """Return the layer's entries and, in CSA, the indexer's: float32 [n, channels].

        Args:
            pooled: float32 [n, width], means of the sources.
            positions: int [n], first position of each entry's own group.
        """
        turns, found = self._rotation.at(positions), []
        for norm, (_, first, width) in zip(self._norms, self.names, strict=True):
            entry = norm.normalize(pooled[:, first : first + width])
            rotate(entry[:, None, -self._rope_dim :], turns)
            found.append(entry)
        return found
