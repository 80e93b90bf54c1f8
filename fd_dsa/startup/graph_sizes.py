"""Sizes of captured steps, and the memory of captured and of eager steps."""

from __future__ import annotations

from collections.abc import Sequence

from fd_dsa.attention.protocol import PromptLimits
from fd_dsa.config import EngineConfig
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.moe import EXPERT_BYTES
from fd_dsa.models.registry import FamilyConfig
from fd_dsa.startup.memory import WIDTHS

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


def step_bytes(
    config: EngineConfig, model_config: FamilyConfig, max_model_len: int
) -> dict[str, int]:
    """Return the bytes of the steps of an engine on a device, as arguments of `plan_memory`.

    Args:
        config: flags, resolved for a device.
        model_config: configuration of the model, or of one rank's part.
        max_model_len: longest prompt plus output, tokens.
    """
    prompts = config.prompt_capture_sizes, config.max_decode_tokens
    sizes = config.capture_sizes, max_model_len, *prompts
    tokens, dtype = config.num_batched_tokens, config.dtype
    return {
        "graph_bytes": graph_bytes(model_config, *sizes, dtype=dtype),
        "activation_bytes": activation_bytes(model_config, tokens, dtype),
    }


def graph_bytes(
    config: FamilyConfig,
    sizes: Sequence[int],
    max_model_len: int,
    prompt_sizes: Sequence[int] = (),
    max_samples: int = 0,
    *,
    dtype: str = "bfloat16",
) -> int:
    """Return an upper bound of the bytes of captured steps, with prompts and without.

    Each graph keeps the driver's own data. With a layer for multi-token prediction it also keeps
    the hidden states that the graph of the layer reads. All graphs share the activations of the
    largest one, counted twice, because one activation rarely fits into the place of another. The
    shared logits count as memory of the sampling.

    Args:
        config: configuration of the model, or of one rank's part.
        sizes: captured numbers of tokens of decode steps.
        max_model_len: longest prompt plus output, tokens.
        prompt_sizes: captured numbers of tokens of steps with prompts.
        max_samples: maximum number of tokens that such a step samples.
        dtype: type of activations.
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
        num_streams = 1
        if prompt_sizes:
            # keys and values of every head, which only activations in bfloat16 have
            keys = _most_keys(max(prompt_sizes), config.index_topk)
            widths = config.qk_nope_head_dim + config.v_head_dim
            kept = keys * config.num_attention_heads * widths * WIDTHS[dtype]
    else:
        num_streams = config.hc_mult
    if config.mtp is not None:
        # further drafts have graphs for powers of two of rows
        kept += lengths * sum(captured) * num_streams * config.hidden_size * WIDTHS[dtype]
        graphs = 2 * (graphs + lengths * (1 + len(powers_below(max(sizes)))))
    kept += 2 * activation_bytes(config, max(captured), dtype)
    kept += 4 * max(*sizes, max_samples) * logits
    return kept + graphs * _GRAPH_BYTES + _POOL_BYTES


def activation_bytes(config: FamilyConfig, num_tokens: int, dtype: str) -> int:
    """Return an upper bound of the bytes of a step's activations, close to the largest sum.

    A layer keeps its inputs until its end. Its attention and its experts take memory one after the
    other. Logits count as memory of the sampling, and buffers of the attention as its workspace.

    Args:
        config: configuration of the model, or of one rank's part.
        num_tokens: number of tokens of the step.
        dtype: type of activations.
    """
    width, hidden, expert = WIDTHS[dtype], config.hidden_size, config.moe_intermediate_size
    if isinstance(config, ModelConfig):
        streams, block = 1, max(_dsa_values(config), 3 * config.intermediate_size)
        # a layer that drafts keeps hidden states of the step before
        drafting = hidden
    else:
        streams, block = config.hc_mult, _v4_values(config)
        # inputs of the layer that drafts, normed ones in two forms
        drafting = (5 * streams + 3) * hidden // 2
    if config.mtp is None:
        drafting = 0
    # streams before and after a connection, two changes, and the normed sum in two forms
    kept = (4 * streams + 7) * hidden // 2 + drafting
    # a longer step runs its experts in parts
    whole = EXPERT_BYTES // (width * config.num_experts_per_tok * max(hidden, expert))
    selected = min(num_tokens, whole) * config.num_experts_per_tok * (hidden + expert)
    # results, and scores and lists with 4 bytes for each expert
    others = 3 * hidden + 8 * config.n_routed_experts // width
    return width * (num_tokens * kept + max(num_tokens * block, num_tokens * others + selected))


def _dsa_values(config: ModelConfig) -> int:
    """Return the values of a token in the attention of DeepSeek-V3.2 or GLM-5."""
    # latents of queries in two forms, then latents and keys
    latents = 5 * config.q_lora_rank // 2 + config.kv_lora_rank
    latents += config.qk_rope_head_dim + config.index_head_dim
    # queries and results
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return latents + heads + config.index_n_heads * config.index_head_dim


def _v4_values(config: DeepseekV4Config) -> int:
    """Return the values of a token in the attention of DeepSeek-V4."""
    width, index = config.head_dim, config.index_head_dim
    # latents of queries in two forms, keys, and float32 values and gates of both halves
    latents = 5 * config.q_lora_rank // 2 + 2 * width + 8 * (width + index)
    # queries and results of all heads, queries of the indexer, selected entries
    heads = 2 * config.num_attention_heads * width + config.index_n_heads * (index + 2)
    return latents + heads + 2 * config.index_topk
