"""DeepseekScalingRotaryEmbedding (`model_executor/layers/rotary_embedding.py`): its table, YaRN.

Upstream's `forward` hard-codes the interleaved pairing, for MLA and for the indexer
alike; DeepSeek's own indexer pairs by halves.
"""

from __future__ import annotations

import math

import numpy as np
import paddle
from paddle import nn


def yarn_get_mscale(scale: float = 1, mscale: float = 1) -> float:
    """YaRN's attention multiplier; 1 without an extension."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


class DeepseekScalingRotaryEmbedding(nn.Layer):
    """A table of cos and sin, `cos_sin_cache` [positions, rotary_dim], in the default dtype."""

    def __init__(
        self,
        rotary_dim: int,
        max_position_embeddings: int,
        base: float,
        scaling_factor: float,
        *,
        extrapolation_factor: float = 1,
        attn_factor: float = 1,
        beta_fast: float = 32,
        beta_slow: float = 1,
        mscale: float = 1,
        mscale_all_dim: float = 0,
    ) -> None:
        super().__init__()
        self.rotary_dim, self.base = rotary_dim, base
        self.max_position_embeddings = max_position_embeddings
        self.scaling_factor, self.extrapolation_factor = scaling_factor, extrapolation_factor
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        ratio = yarn_get_mscale(scaling_factor, mscale) / yarn_get_mscale(
            scaling_factor, mscale_all_dim
        )
        self.mscale = float(ratio * attn_factor)
        positions = np.arange(int(max_position_embeddings * scaling_factor), dtype=np.float32)
        angles = positions[:, None] * self._inverse_frequencies()
        table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * np.float32(self.mscale)
        self.register_buffer(
            "cos_sin_cache", paddle.to_tensor(table, dtype=paddle.get_default_dtype())
        )

    def _inverse_frequencies(self) -> np.ndarray:
        """float32 [rotary_dim // 2]; YaRN's blend, which is no blend at a factor of 1."""
        exponent = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / self.rotary_dim
        plain = 1.0 / np.float32(self.base) ** exponent

        def pair_with(rotations: float) -> float:
            turns = self.max_position_embeddings / (rotations * 2 * math.pi)
            return self.rotary_dim * math.log(turns) / (2 * math.log(self.base))

        low = max(math.floor(pair_with(self.beta_fast)), 0)
        high = min(math.ceil(pair_with(self.beta_slow)), self.rotary_dim - 1)
        span = max(high - low, 0.001)
        ramp = np.clip((np.arange(self.rotary_dim // 2) - low) / span, 0, 1)
        kept = (1 - ramp) * self.extrapolation_factor
        blend = plain / self.scaling_factor * (1 - kept) + plain * kept
        return blend.astype(np.float32)

    def forward(self, position_ids: object, query: object, key: object) -> None:
        """Upstream's kernel, which rotates in place by the table, is not part of the double."""
        raise NotImplementedError(f"no kernel for a table of {self.cos_sin_cache.shape}")
