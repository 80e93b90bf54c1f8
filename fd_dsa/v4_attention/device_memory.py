"""Memory of DeepSeek-V4's attention on a device without its pools, before it is allocated."""

from __future__ import annotations

import math

from fd_dsa.attention.device_memory import LOGITS_BYTES
from fd_dsa.models.deepseek_v4.config import CSA, HCA, DeepseekV4Config
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4PrepareConfig


def prepare_sizes(config: DeepseekV4Config, batch: InputBatch, num_blocks: int) -> V4PrepareConfig:
    """Return the sizes of the index arrays on a device."""
    columns = batch.block_tables.shape[1]
    return V4PrepareConfig(
        window_size=config.sliding_window,
        spec_tokens=0,
        block_size=batch.block_size,
        csa_ratio=config.compress_rates[CSA],
        hca_ratio=config.compress_rates[HCA],
        index_topk=config.index_topk,
        num_slots=batch.max_num_seqs,
        num_blocks=num_blocks,
        max_blocks_per_seq=columns,
        max_num_seqs=batch.max_num_seqs,
        max_num_tokens=batch.max_num_tokens,
        max_tokens_per_seq=batch.max_num_tokens,
        max_model_len=columns * batch.block_size,
        swa="ring",
        comp_base=0,
        hca_mode="table",
    )


def num_scores(config: DeepseekV4Config, batch: InputBatch) -> int:
    """Return the number of scores that the indexer's buffer holds."""
    longest = batch.max_row_len // config.compress_rates[CSA]
    return min(max(LOGITS_BYTES // 4, longest), batch.max_num_tokens * longest)


def workspace_bytes(config: DeepseekV4Config, batch: InputBatch) -> int:
    """Return the bytes of scores, angles and index arrays, which V4DeviceBackend allocates."""
    arrays = OUTPUT_SHAPES(prepare_sizes(config, batch, num_blocks=1)).values()
    angles = 2 * batch.max_row_len * config.qk_rope_head_dim
    table = batch.block_tables.size
    return 4 * (num_scores(config, batch) + angles + table + sum(map(math.prod, arrays)))
