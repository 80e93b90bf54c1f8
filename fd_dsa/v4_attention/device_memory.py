"""Memory of DeepSeek-V4's attention on a device without its pools, before it is allocated."""

from __future__ import annotations

from fd_dsa.attention.device_memory import LOGITS_BYTES
from fd_dsa.models.deepseek_v4.config import CSA, DeepseekV4Config
from fd_dsa.ops.v4_attend_kernel import partial_bytes
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.v4_attention.device_step import array_bytes


def num_scores(config: DeepseekV4Config, batch: InputBatch) -> int:
    """Return the number of scores that the indexer's buffer holds."""
    longest = batch.max_row_len // config.compress_rates[CSA]
    return min(max(LOGITS_BYTES // 4, longest), batch.max_num_tokens * longest)


def workspace_bytes(config: DeepseekV4Config, batch: InputBatch) -> int:
    """Return the bytes that V4DeviceBackend allocates.

    They are of scores, angles, index arrays and partial results of attention.
    """
    angles = 2 * batch.max_row_len * config.qk_rope_head_dim
    others = array_bytes(config, batch) + partial_bytes(config.head_dim)
    return 4 * (num_scores(config, batch) + angles) + others
