"""Sizes that an attention backend is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fd_dsa.cache_formats import CacheLayout
from fd_dsa.errors import ConfigError

_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class DSABackendConfig:
    """Sizes of the model and of the largest step. Lengths are in tokens.

    Attributes:
        num_heads: attention heads on this device.
        index_n_heads, index_topk: heads of the indexer, keys that it chooses.
        softmax_scale: factor of the attention scores.
        cache_layout: format of the caches.
        max_num_seqs, max_num_tokens, max_blocks_per_seq, num_blocks: as of a StepMetadataBuilder.
        dtype: of activations and results: "float32", or on a device also "bfloat16".
        int32_position_ids: whether `forward_meta.position_ids` is int32, as older trees of
            FastDeploy take it; the operators here go on with the step's own int64.
        tokens_per_row: new tokens that most decode rows have: 1, and the drafts.
        head_widths: of a head's keys without their rotated part, and of its values, before
            absorption; None: the layers bring absorbed queries alone.

    Raises:
        ConfigError: another dtype, or a row without tokens.
    """

    num_heads: int
    index_n_heads: int
    index_topk: int
    softmax_scale: float
    cache_layout: CacheLayout
    max_num_seqs: int
    max_num_tokens: int
    max_blocks_per_seq: int
    num_blocks: int | None = None
    dtype: str = "float32"
    int32_position_ids: bool = False
    tokens_per_row: int = 1
    head_widths: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype: got {self.dtype!r}, allowed are {', '.join(_DTYPES)}")
        if self.tokens_per_row < 1:
            raise ConfigError(f"tokens_per_row: got {self.tokens_per_row}, allowed is at least 1")

    @property
    def query_format(self) -> dict[str, Any]:
        """Format of the indexer's queries, as keyword arguments of `indexer_query`."""
        layout = self.cache_layout
        return {
            "quantized": layout.is_fp8,
            "hadamard": layout.index_hadamard,
            "scale_fmt": layout.index_scale_fmt,
        }
