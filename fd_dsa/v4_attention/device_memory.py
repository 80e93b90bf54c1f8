"""Memory of DeepSeek-V4's attention on a device without its pools, before it is allocated."""

from __future__ import annotations

import math
from dataclasses import replace

from fd_dsa.attention.device_memory import LOGITS_BYTES
from fd_dsa.models.deepseek_v4.config import CSA, DeepseekV4Config
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.v4_attention.pools import prepare_sizes
from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4PrepareConfig


def device_sizes(config: DeepseekV4Config, batch: InputBatch, num_blocks: int) -> V4PrepareConfig:
    """Return the sizes of the index arrays on a device, whose pools hold only entries."""
    return replace(prepare_sizes(config, batch, num_blocks, "ring"), comp_base=0)


def num_scores(config: DeepseekV4Config, batch: InputBatch) -> int:
    """Return the number of scores that the indexer's buffer holds."""
    longest = batch.max_row_len // config.compress_rates[CSA]
    return min(max(LOGITS_BYTES // 4, longest), batch.max_num_tokens * longest)


def workspace_bytes(config: DeepseekV4Config, batch: InputBatch) -> int:
    """Return the bytes of scores, angles and index arrays, which V4DeviceBackend allocates."""
    arrays = OUTPUT_SHAPES(device_sizes(config, batch, num_blocks=1)).values()
    angles = 2 * batch.max_row_len * config.qk_rope_head_dim
    table = batch.block_tables.size
    return 4 * (num_scores(config, batch) + angles + table + sum(map(math.prod, arrays)))
