"""Sizes of captured steps, and the memory that they take."""

from __future__ import annotations

from collections.abc import Sequence

from fd_dsa.models.config import ModelConfig

PROMPT_SIZES = (32, 64, 128, 256)
"""Captured sizes of short prompts, keys. The device bounds larger prompts, not the launches."""
MAX_PROMPTS = 8
"""Rows of a captured step of prompts."""
MIXED_SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Numbers of tokens of the steps with prompts that the start measures."""
# data of the driver for a graph of some thousand launches
_GRAPH_BYTES = 4 << 20


def powers_below(limit: int) -> list[int]:
    """Return the powers of two below a limit, ascending."""
    return [1 << i for i in range((limit - 1).bit_length())]


def graph_bytes(config: ModelConfig, sizes: Sequence[int], max_model_len: int) -> int:
    """Return an upper bound of the bytes of captured steps: decode steps and short prompts.

    Each graph keeps the driver's own data. With a layer for multi-token prediction it also keeps
    the hidden states that the graph of the layer reads. All graphs share the activations of the
    largest one, counted as if a layer freed no activation before its end. The shared logits count
    as memory of the sampling.

    Args:
        config: configuration of the model, or of one rank's part.
        sizes: captured numbers of tokens of decode steps.
        max_model_len: longest prompt plus output, tokens.
    """
    if not sizes:
        return 0
    # graphs of each size: for rows of any length, and for rows that need no selection of keys
    lengths = 1 if max_model_len <= config.index_topk else 2
    prompts = [size for size in PROMPT_SIZES if size <= config.index_topk]
    graphs = len(sizes) * lengths + len(prompts)
    kept = 0
    heads, rank, hidden = config.num_attention_heads, config.kv_lora_rank, config.hidden_size
    if config.mtp is not None:
        # further drafts have graphs for powers of two of rows
        kept = (lengths * sum(sizes) + sum(prompts)) * hidden
        graphs = 2 * (graphs + lengths * (1 + len(powers_below(max(sizes)))))
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    attention = 2 * (config.q_lora_rank + rank) + heads * (2 * query + 2 * rank)
    attention += 3 * heads * config.v_head_dim + config.index_n_heads * config.index_head_dim
    # activations of the selected experts, then the router's scores
    moe = config.num_experts_per_tok * (config.moe_intermediate_size + hidden)
    moe += config.n_routed_experts
    dense = 3 * max(config.intermediate_size, config.moe_intermediate_size)
    token = attention + moe + dense + 8 * hidden
    # some heads have results that are copied to the logits, and several ranks gather theirs
    logits = config.head_rows
    if config.head_rows < config.vocab_size:
        logits += config.vocab_size
    values = kept + max(*sizes, *prompts) * token + max(*sizes, MAX_PROMPTS) * logits
    return 4 * values + graphs * _GRAPH_BYTES
