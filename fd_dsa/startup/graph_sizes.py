"""Sizes of captured steps, and the memory that they take."""

from __future__ import annotations

from collections.abc import Sequence

from fd_dsa.attention.protocol import PromptLimits
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.registry import FamilyConfig

_MAX_PROMPTS = 16
# data of the driver for a graph of some thousand launches
_GRAPH_BYTES = 4 << 20
# pages of the driver that the shared memory of all graphs fills in part
_POOL_BYTES = 8 << 20


def powers_below(limit: int) -> list[int]:
    """Return the powers of two below a limit, ascending."""
    return [1 << i for i in range((limit - 1).bit_length())]


def prompt_limits(
    size: int, max_dense_keys: int, max_num_seqs: int, max_samples: int, max_keys: int
) -> PromptLimits:
    """Return the limits of the steps with prompts that are padded to a number of tokens.

    Args:
        max_dense_keys: maximum keys of a token that attends to all of them.
        max_num_seqs: maximum number of rows of a step.
        max_samples: maximum number of tokens that a step samples.
        max_keys: maximum keys that attention gathers, 0 = no token attends densely.
    """
    rows = min(_MAX_PROMPTS, max_num_seqs)
    keys = min(_most_keys(size, max_dense_keys), max_keys) if max_keys else rows * max_dense_keys
    return PromptLimits(rows, keys, min(size, max_samples))


def _most_keys(size: int, max_dense_keys: int) -> int:
    """Return the keys of dense tokens that a step of some tokens may have: two rows' in a cache."""
    return size + 2 * max_dense_keys


def graph_bytes(
    config: FamilyConfig,
    sizes: Sequence[int],
    max_model_len: int,
    prompt_sizes: Sequence[int] = (),
    max_samples: int = 0,
) -> int:
    """Return an upper bound of the bytes of captured steps, with prompts and without.

    Each graph keeps the driver's own data. With a layer for multi-token prediction it also keeps
    the hidden states that the graph of the layer reads. All graphs share the activations of the
    largest one, counted as if a layer freed no activation before its end. The shared logits count
    as memory of the sampling.

    Args:
        config: configuration of the model, or of one rank's part.
        sizes: captured numbers of tokens of decode steps.
        max_model_len: longest prompt plus output, tokens.
        prompt_sizes: captured numbers of tokens of steps with prompts.
        max_samples: maximum number of tokens that such a step samples.
    """
    if not sizes:
        return 0
    # graphs of each size: for rows of any length, and for rows that need no selection of keys
    lengths = 1 if max_model_len <= config.max_dense_keys else 2
    captured, kept, logits = (*sizes, *prompt_sizes), 0, config.head_rows
    # some heads have results that are copied to the logits, and several ranks gather theirs
    if config.head_rows < config.vocab_size:
        logits += config.vocab_size
    graphs = lengths * len(captured)
    if isinstance(config, ModelConfig):
        has_layer, num_streams, token = config.mtp is not None, 1, _dsa_values(config)
        if prompt_sizes:
            # keys and values of every head, which only activations in bfloat16 have
            keys = _most_keys(max(prompt_sizes), config.index_topk)
            widths = config.qk_nope_head_dim + config.v_head_dim
            kept = keys * config.num_attention_heads * widths // 2
    else:
        has_layer, num_streams, token = config.has_mtp_layer, config.hc_mult, _v4_values(config)
    if has_layer:
        # further drafts have graphs for powers of two of rows
        kept += lengths * sum(captured) * num_streams * config.hidden_size
        graphs = 2 * (graphs + lengths * (1 + len(powers_below(max(sizes)))))
    values = kept + max(captured) * token + max(*sizes, max_samples) * logits
    return 4 * values + graphs * _GRAPH_BYTES + _POOL_BYTES


def _dsa_values(config: ModelConfig) -> int:
    """Return the values of a token in a layer of DeepSeek-V3.2 or GLM-5."""
    heads, rank, hidden = config.num_attention_heads, config.kv_lora_rank, config.hidden_size
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    attention = 2 * (config.q_lora_rank + rank) + heads * (2 * query + 2 * rank)
    attention += 3 * heads * config.v_head_dim + config.index_n_heads * config.index_head_dim
    # activations of the selected experts, then the router's scores
    moe = config.num_experts_per_tok * (config.moe_intermediate_size + hidden)
    moe += config.n_routed_experts
    dense = 3 * max(config.intermediate_size, config.moe_intermediate_size)
    return attention + moe + dense + 8 * hidden


def _v4_values(config: DeepseekV4Config) -> int:
    """Return the values of a token in a layer of DeepSeek-V4."""
    width, hidden, expert = config.head_dim, config.hidden_size, config.moe_intermediate_size
    heads, index_heads = config.num_attention_heads * width, config.index_n_heads
    # latents and keys, sources of both halves, queries, results of all heads, selected entries
    attention = 2 * (config.q_lora_rank + width) + 4 * (width + config.index_head_dim)
    attention += 3 * heads + config.o_groups * config.o_lora_rank
    attention += index_heads * (config.index_head_dim + 1) + config.index_topk
    moe = config.num_experts_per_tok * (expert + hidden) + config.n_routed_experts
    # streams before and after both connections, and the parts of a connection's sums
    streams = (3 * config.hc_mult + 1) * hidden
    return attention + moe + 3 * expert + streams + 8 * hidden
