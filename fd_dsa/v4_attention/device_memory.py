"""Memory of DeepSeek-V4's attention on a device without its pools, before it is allocated."""

from __future__ import annotations

from fd_dsa.attention.config import IndexerSizes
from fd_dsa.attention.device_memory import score_sizes
from fd_dsa.device.allocation import ByteCounter, add_buffers
from fd_dsa.models.deepseek_v4.config import CSA, WINDOW
from fd_dsa.ops import v4_plain
from fd_dsa.ops.v4_attend import new_partials, num_programs
from fd_dsa.ops.v4_attend_cuda import suits
from fd_dsa.ops.v4_plain import PlainSizes
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.triton_runtime.driver import GpuTraits
from fd_dsa.v4_attention.device_pools import DeviceLayout
from fd_dsa.v4_attention.device_step import StepPlaces


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


def plain_sizes(layout: DeviceLayout, batch: InputBatch, dtype: str) -> PlainSizes | None:
    """Return the sizes of the values of records, None if tokens of prompts always read records.

    Args:
        dtype: type of activations.
    """
    config = layout.config
    ratios = [config.compress_rates[kind] for kind in config.layer_types if kind != WINDOW]
    widths, least = (config.head_dim, config.qk_rope_head_dim), v4_plain.LEAST_TOKENS
    if not (layout.is_fp8 and ratios and batch.max_num_tokens >= least):
        return None
    # form of the attended values if `wo_a` is in FP8
    rounds = None if config.weight_block_size is None else config.round_scales
    if not suits(dtype, num_programs(least, 1), *widths, rounds):
        return None
    max_rows, columns = batch.block_tables.shape
    counts = batch.max_num_tokens, max_rows, columns, layout.max_drafts
    rings = config.sliding_window, layout.ring_rows
    return PlainSizes(*counts, *rings, layout.block_size, min(ratios), *widths)


def workspace_bytes(layout: DeviceLayout, batch: InputBatch, dtype: str, gpu: GpuTraits) -> int:
    """Return the bytes that V4DeviceBackend allocates.

    They are of scores, values of records, angles, index arrays and partial results of attention.

    Args:
        dtype: type of activations.
        gpu: traits of the device, which select the kernels and their memory.
    """
    config, count = layout.config, ByteCounter()
    plain = plain_sizes(layout, batch, dtype)
    least = plain.least_words if plain else 0
    scores = score_sizes(indexer_sizes(layout, batch, dtype), gpu, least)
    add_buffers({}, scores, count)
    if plain is not None:
        for shape in plain.arrays(plain.capacity(scores["logits"][0])):
            count(shape, "int32")
    # both tables of angles, which are not computed here because that takes long
    count((2, batch.max_row_len, config.qk_rope_head_dim), "float32")
    StepPlaces(layout, batch, count)
    new_partials(config.head_dim, count)
    return count.total
