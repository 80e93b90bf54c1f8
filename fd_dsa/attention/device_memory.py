"""Memory of the attention on a device: sizes of its buffers, and their bytes."""

from __future__ import annotations

from fd_dsa.attention.config import DSABackendConfig, IndexerSizes
from fd_dsa.attention.device_scores import tile_sizes, tiles_unsupported_reason
from fd_dsa.device.allocation import ByteCounter, Sizes, add_buffers
from fd_dsa.ops.mla import tensor_core
from fd_dsa.triton_runtime.driver import GpuTraits

LOGITS_BYTES = 512 << 20
"""Max memory for the scores of a layer, or one token's scores if they take more. The tokens of a
longer step are scored in chunks."""


def logits_size(sizes: IndexerSizes, least: int = 0) -> Sizes:
    """Return the size of the buffer of scores, at least `least` of them."""
    count = min(max(LOGITS_BYTES // 4, sizes.max_keys), sizes.max_num_tokens * sizes.max_keys)
    return {"logits": (max(count, least), (), "float32")}


def score_sizes(sizes: IndexerSizes, gpu: GpuTraits, least: int = 0) -> Sizes:
    """Return the sizes of all buffers that SelectedScores needs on a device.

    Args:
        least: least number of scores that fit.
    """
    found = logits_size(sizes, least)
    if tiles_unsupported_reason(sizes) is None:
        found |= tile_sizes(sizes, found["logits"][0], gpu.num_processors)
    return found


def buffer_sizes(config: DSABackendConfig) -> Sizes:
    """Return the sizes of the buffers of a DeviceAttention, without those of its scores."""
    layout, tokens = config.cache_layout, config.max_num_tokens
    heads, index_heads, rank = config.num_heads, config.index_n_heads, layout.kv_lora_rank
    codes = "uint8" if layout.is_fp8 else config.dtype
    # a part of the tokens times the heads of all ranks may be a few more
    ranks, rope = config.exchange_ranks, layout.qk_rope_head_dim
    exchanged: Sizes = {}
    attended = -(-tokens // ranks) * ranks
    if ranks > 1 and config.head_widths is not None:
        widest = max(config.head_widths[0] + rope, config.head_widths[1])
        values = attended * heads * widest
        exchanged = dict.fromkeys(("parts", "whole"), (values, (), config.dtype))
    return (
        exchanged
        | logits_size(config.indexer)
        | {
            "slots": (tokens * config.index_topk, (), "int32"),
            "mla_q": (attended, (heads, rank + rope), config.dtype),
            "latents": (attended, (heads, rank), config.dtype),
            "index_q": (tokens, (index_heads, layout.index_head_dim), codes),
            "index_weights": (tokens, (index_heads,), "float32"),
            "index_k": (tokens, (layout.index_head_dim,), config.dtype),
            "head_weights": (tokens, (index_heads,), "float32"),
        }
    )


def workspace_bytes(config: DSABackendConfig, gpu: GpuTraits) -> int:
    """Return the bytes that a DeviceAttention of this configuration allocates.

    Args:
        gpu: traits of the device, which select the kernels and their memory.
    """
    count = ByteCounter()
    add_buffers({}, buffer_sizes(config) | score_sizes(config.indexer, gpu), count)
    if tensor_core.unsupported_reason(gpu.capability, *config.kernel_types) is None:
        for heads in {config.num_heads, config.exchanged_heads}:
            tensor_core.new_partials(heads, count)
    if config.head_widths is None:
        return count.total
    # other libraries' tensors have no dense prompts, whose module imports Paddle
    from fd_dsa.attention import dense_prompts

    return count.total + dense_prompts.workspace_bytes(config)
