"""Attention of DeepSeek-V4: one key head, a window, compressed entries and sinks."""

from __future__ import annotations

import numpy as np

from fd_dsa.attention.protocol import LayerStep
from fd_dsa.models.deepseek_v4.compressor import Compressor
from fd_dsa.models.deepseek_v4.config import CSA, WINDOW, DeepseekV4Config
from fd_dsa.models.deepseek_v4.norm import RowNorm, length
from fd_dsa.models.deepseek_v4.rotation import Angles, Rotation, rotate
from fd_dsa.models.weights_protocol import HostOnlyWeights


class V4Attention:
    """Attention of one layer. The backend owns its caches and indices.

    A single GEMM computes all projections of the layer's input: latents of the queries, keys, head
    weights of the indexer, and sources of the compressors.

    Attributes:
        sinks: float32 [num_heads], logit of a key without a value.
        compressor: makes the layer's entries; None in a window-only layer.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        layer_id: int,
        weights: HostOnlyWeights,
        prefix: str,
        rotation: Rotation,
    ) -> None:
        self.layer_id, kind = layer_id, config.layer_types[layer_id]
        self._heads, self._width = config.num_attention_heads, config.head_dim
        self._rank, self._rope_dim = config.q_lora_rank, config.qk_rope_head_dim
        self._groups, self._eps = config.o_groups, config.rms_norm_eps
        places = {"wq_a": (0, self._rank), "wkv": (self._rank, self._width)}
        end = self._rank + self._width
        self._q_b = weights.matrix(self._rank, {f"{prefix}wq_b.weight": self._heads * self._width})
        self.compressor = self._index_b = None
        if kind == CSA:
            heads, width = config.index_n_heads, config.index_head_dim
            self._index_heads, self._index_scale = heads, np.float32((heads * width) ** -0.5)
            places["indexer.weights_proj"] = (end, heads)
            end += heads
            self._index_b = weights.matrix(
                self._rank, {f"{prefix}indexer.wq_b.weight": heads * width}
            )
        columns = {f"{prefix}{name}.weight": [place] for name, place in places.items()}
        self._sources_at = end
        if kind != WINDOW:
            self.compressor = Compressor(config, kind, weights, prefix, rotation)
            columns |= self.compressor.places(end)
        self._in = weights.placed(config.hidden_size, columns)
        self._q_norm = RowNorm(weights, f"{prefix}q_norm.weight", self._rank, self._eps)
        self._kv_norm = RowNorm(weights, f"{prefix}kv_norm.weight", self._width, self._eps)
        self.sinks = weights.vector({f"{prefix}attn_sink": self._heads})
        group = self._heads * self._width // self._groups
        low = config.o_lora_rank
        self._out_a = weights.grouped(f"{prefix}wo_a.weight", self._groups, group, low)
        self._out_b = weights.matrix(
            self._groups * low, {f"{prefix}wo_b.weight": config.hidden_size}
        )

    def forward(
        self, x: np.ndarray, angles: Angles, forward_meta: LayerStep, kept: np.ndarray | slice
    ) -> np.ndarray:
        """Compute the attention output of the `kept` tokens.

        Args:
            x: float32 [num_tokens, hidden_size], normed.
            angles: angles of the step's positions.
            forward_meta: step whose metadata was built last.
            kept: index of the tokens whose output is computed.

        Returns:
            float32 [number of kept tokens, hidden_size].
        """
        attended, _ = forward_meta.attn_backend.forward(self, x, angles, forward_meta)
        attended = attended[kept]
        rotate(attended[:, :, -self._rope_dim :], angles.backward[kept])
        low = self._out_a.matmul_by_head(attended.reshape(len(attended), self._groups, -1))
        out: np.ndarray = self._out_b.matmul(low.reshape(len(low), -1))
        return out

    @property
    def has_indexer(self) -> bool:
        """True if an indexer selects the entries that tokens attend to."""
        return self._index_b is not None

    def project(
        self, x: np.ndarray, angles: Angles
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Compute all projections of the layer's input.

        Args:
            x, angles: as for `forward`.

        Returns:
            projected: float32 [num_tokens, all columns], which `index_queries` reads.
            latent: float32 [num_tokens, q_lora_rank]; normed latents of the queries.
            kv: float32 [num_tokens, head_dim]; keys, normed and rotated.
            sources: float32 [num_tokens, halves, 2, width], a view; None without a compressor.
        """
        rank = self._rank
        projected: np.ndarray = self._in.matmul(x)
        kv = self._kv_norm.normalize(projected[:, rank : rank + self._width])
        rotate(kv[:, None, -self._rope_dim :], angles.forward)
        sources = None
        if self.compressor is not None:
            shape = len(projected), self.compressor.halves, 2, self.compressor.width
            sources = projected[:, self._sources_at :].reshape(shape)
        return projected, self._q_norm.normalize(projected[:, :rank]), kv, sources

    def queries(self, latent: np.ndarray, angles: Angles) -> np.ndarray:
        """Project latents to queries, whose last channels are rotated.

        Each head is scaled to length 1, which is RMSNorm times the score factor width ** -0.5.

        Returns:
            float32 [num_tokens, num_heads, head_dim].
        """
        query: np.ndarray = self._q_b.matmul(latent)
        rows = query.reshape(-1, self._width)
        rows /= length(rows, self._eps)
        heads = query.reshape(-1, self._heads, self._width)
        rotate(heads[:, :, -self._rope_dim :], angles.forward)
        return heads

    def index_queries(
        self, latent: np.ndarray, projected: np.ndarray, angles: Angles
    ) -> tuple[np.ndarray, np.ndarray]:
        """Project latents to the queries of the indexer.

        Args:
            latent, projected: results of `project`.
            angles: as for `forward`.

        Returns:
            Rotated queries, float32 [num_tokens, index_n_heads, index_head_dim]; and head weights,
            float32 [num_tokens, index_n_heads], which include the factors of the scores.
        """
        assert self._index_b is not None
        query = self._index_b.matmul(latent).reshape(len(latent), self._index_heads, -1)
        rotate(query[:, :, -self._rope_dim :], angles.forward)
        first = self._rank + self._width
        return query, projected[:, first : first + self._index_heads] * self._index_scale
