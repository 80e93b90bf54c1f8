"""Sizes that an attention backend is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fd_dsa.cache_formats import CacheLayout
from fd_dsa.errors import ConfigError

_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class IndexerSizes:
    """Sizes of an indexer and of the largest step. A key may stand for several tokens.

    Attributes:
        num_heads: heads of the indexer.
        topk: keys that it selects for a token.
        width: values of a key.
        q_dtype: dtype of queries, "uint8" for e4m3 codes.
        cache_dtype: name of a CacheFormat.
        block_size: keys of a block.
        max_num_tokens, max_blocks_per_seq, tokens_per_row: see DSABackendConfig.
    """

    num_heads: int
    topk: int
    width: int
    q_dtype: str
    cache_dtype: str
    block_size: int
    max_num_tokens: int
    max_blocks_per_seq: int
    tokens_per_row: int

    @property
    def max_keys(self) -> int:
        """Max keys of a row."""
        return self.max_blocks_per_seq * self.block_size


@dataclass(frozen=True, slots=True)
class DSABackendConfig:
    """Sizes of the model and of the largest step. Lengths are in tokens.

    Attributes:
        num_heads: attention heads on this device.
        index_n_heads: heads of the indexer.
        index_topk: keys that the indexer selects for a token.
        softmax_scale: factor of the attention scores.
        cache_layout: format of the caches.
        max_num_seqs, max_num_tokens, max_blocks_per_seq, num_blocks: see StepMetadataBuilder.
        dtype: dtype of activations and results, "float32", or on a device also "bfloat16".
        int32_position_ids: True if `forward_meta.position_ids` must be int32, as in older trees of
            FastDeploy. The operators of this package read the step's own int64 positions.
        tokens_per_row: usual new tokens of a decode row, 1 plus its drafts.
        head_widths: width of a head's keys without their rotated part, and of its values, before
            absorption. None if the layers pass only absorbed queries.
        exchange_ranks: ranks that divide the tokens of long steps, see HeadExchange; 1 = none.

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
    exchange_ranks: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype: got {self.dtype!r}, allowed are {', '.join(_DTYPES)}")
        if self.tokens_per_row < 1:
            raise ConfigError(f"tokens_per_row: got {self.tokens_per_row}, allowed is at least 1")

    @property
    def exchanged_heads(self) -> int:
        """Attention heads of all ranks that exchange them."""
        return self.num_heads * self.exchange_ranks

    @property
    def indexer(self) -> IndexerSizes:
        """Sizes of the indexer."""
        layout = self.cache_layout
        return IndexerSizes(
            num_heads=self.index_n_heads,
            topk=self.index_topk,
            width=layout.index_head_dim,
            q_dtype="uint8" if layout.is_fp8 else self.dtype,
            cache_dtype=layout.kv_cache_dtype,
            block_size=layout.block_size,
            max_num_tokens=self.max_num_tokens,
            max_blocks_per_seq=self.max_blocks_per_seq,
            tokens_per_row=self.tokens_per_row,
        )

    @property
    def query_format(self) -> dict[str, Any]:
        """Keyword arguments of `indexer_query` for the format of the indexer's queries."""
        layout = self.cache_layout
        return {
            "quantized": layout.is_fp8,
            "hadamard": layout.index_hadamard,
            "scale_fmt": layout.index_scale_fmt,
        }

    @property
    def kernel_types(self) -> tuple[str, str, int, int]:
        """Types and widths that select a kernel of sparse MLA."""
        layout = self.cache_layout
        return self.dtype, layout.kv_cache_dtype, layout.kv_lora_rank, layout.qk_rope_head_dim
