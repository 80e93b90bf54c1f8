"""Sizes of the attention of DeepSeek-V3.2 and GLM-5 in a runner."""

from __future__ import annotations

from fd_dsa.attention import CacheLayout, DSABackendConfig
from fd_dsa.environment import exchanged_min_tokens
from fd_dsa.models.config import ModelConfig
from fd_dsa.runner.input_batch import InputBatch


def backend_config(
    config: ModelConfig,
    layout: CacheLayout,
    batch: InputBatch,
    num_blocks: int | None = None,
    dtype: str = "float32",
) -> DSABackendConfig:
    """Return the sizes of a DSAAttentionBackend for a model and a runner's batch."""
    return DSABackendConfig(
        num_heads=config.num_attention_heads,
        index_n_heads=config.index_n_heads,
        index_topk=config.index_topk,
        softmax_scale=config.softmax_scale,
        cache_layout=layout,
        max_num_seqs=batch.max_num_seqs,
        max_num_tokens=batch.max_num_tokens,
        max_blocks_per_seq=batch.block_tables.shape[1],
        num_blocks=num_blocks,
        dtype=dtype,
        head_widths=(config.qk_nope_head_dim, config.v_head_dim),
        exchange_ranks=config.ranks if exchanged_min_tokens() else 1,
    )
