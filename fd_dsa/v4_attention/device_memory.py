"""Memory of DeepSeek-V4's attention on a device without its pools, before it is allocated."""

from __future__ import annotations

from fd_dsa.attention.config import IndexerSizes
from fd_dsa.attention.device_memory import score_sizes
from fd_dsa.device.allocation import buffer_bytes
from fd_dsa.models.deepseek_v4.config import CSA
from fd_dsa.ops.v4_attend import partial_bytes
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.triton_runtime.driver import GpuTraits
from fd_dsa.v4_attention.device_pools import DeviceLayout
from fd_dsa.v4_attention.device_step import array_bytes


def indexer_sizes(layout: DeviceLayout, batch: InputBatch, dtype: str) -> IndexerSizes:
    """Return the sizes of an indexer whose keys are the entries of CSA layers.

    Args:
        dtype: type of activations.
    """
    config = layout.config
    return IndexerSizes(
        num_heads=config.index_n_heads,
        topk=config.index_topk,
        width=config.index_head_dim,
        q_dtype="uint8" if layout.is_fp8 else dtype,
        cache_dtype=layout.dtype,
        block_size=layout.block_size // config.compress_rates[CSA],
        max_num_tokens=batch.max_num_tokens,
        max_blocks_per_seq=batch.block_tables.shape[1],
        tokens_per_row=1 + layout.max_drafts,
    )


def workspace_bytes(layout: DeviceLayout, batch: InputBatch, dtype: str, gpu: GpuTraits) -> int:
    """Return the bytes that V4DeviceBackend allocates.

    They are of scores, angles, index arrays and partial results of attention.

    Args:
        dtype: type of activations.
        gpu: traits of the device, which select the kernels and their memory.
    """
    config = layout.config
    angles = 4 * 2 * batch.max_row_len * config.qk_rope_head_dim
    scores = buffer_bytes(score_sizes(indexer_sizes(layout, batch, dtype), gpu))
    return scores + angles + array_bytes(config, batch) + partial_bytes(config.head_dim)
