"""Settings of fd_dsa's backend and layers, read from FastDeploy's `fd_config`.

Source of the fields: FastDeploy's `config.py`, `layers/attention/dsa_attention_backend.py` and
`models/deepseek_v3.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fd_dsa.attention import DSABackendConfig
from fd_dsa.cache_formats import FP8_BLOCK_SIZE, CacheLayout
from fd_dsa.environment import switch
from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.upstream import FDConfig, ModelConfig
from fd_dsa.models.config import read_indexer_types
from fd_dsa.models.config_reader import FieldReader
from fd_dsa.models.registry import FAMILIES

_SCHEDULE = ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")


@contextmanager
def replaced(config: object, **values: object) -> Iterator[None]:
    """Replace fields of a FastDeploy configuration inside the block."""
    before = {name: vars(config)[name] for name in values if name in vars(config)}
    for name, value in values.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(config, name)
        for name, value in before.items():
            setattr(config, name, value)


def constructor_fields(model_config: ModelConfig) -> dict[str, Any]:
    """Return values for `replaced` that the constructor of FastDeploy's DSA backend accepts.

    The constructor reads `rope_scaling["factor"]`, which GLM-5 does not have, and `rope_theta`,
    which GLM-5 keeps in `rope_parameters`.
    """
    scaling = getattr(model_config, "rope_scaling", None) or {}
    parameters = getattr(model_config, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta", getattr(model_config, "rope_theta", None))
    return {"rope_scaling": scaling if "factor" in scaling else None, "rope_theta": theta}


def core_config(
    fd_config: FDConfig, num_heads: int, softmax_scale: float, dtype: str
) -> DSABackendConfig:
    """Return the backend's configuration for block tables as wide as the longest row.

    Args:
        num_heads: attention heads on this rank.
        softmax_scale: factor of the scores.
        dtype: dtype of the activations on a device.

    Raises:
        ConfigError: a size for which there are no caches; names the field and the flag.
    """
    model, block_size = fd_config.model_config, fd_config.cache_config.block_size
    if block_size != FP8_BLOCK_SIZE:
        raise ConfigError(
            f"block_size: got {block_size}, DSA caches have blocks of {FP8_BLOCK_SIZE} tokens; "
            f"start FastDeploy with --block-size {FP8_BLOCK_SIZE}"
        )
    widths = model.kv_lora_rank, model.qk_rope_head_dim, model.index_head_dim
    speculative = fd_config.speculative_config
    drafts = speculative.num_speculative_tokens if speculative.method is not None else 0
    tokens_per_row = 1 + int(drafts or 0)
    scheduler, graphs = fd_config.scheduler_config, fd_config.graph_opt_config
    max_num_seqs = int(scheduler.max_num_seqs)
    # without chunked prefill a prompt is one chunk, also above the scheduled tokens
    prompts = max(int(scheduler.max_num_batched_tokens), int(fd_config.get_max_chunk_tokens()))
    names = "cudagraph_capture_sizes", "cudagraph_capture_sizes_prefill"
    captured = [size for name in names for size in getattr(graphs, name, None) or ()]
    return DSABackendConfig(
        num_heads=num_heads,
        index_n_heads=model.index_n_heads,
        index_topk=model.index_topk,
        softmax_scale=softmax_scale,
        cache_layout=CacheLayout("fp8_ds_mla", block_size, *widths),
        max_num_seqs=max_num_seqs,
        # prompts in addition to decode rows, or the largest graph
        max_num_tokens=max(prompts + max_num_seqs * tokens_per_row, *captured, 1),
        max_blocks_per_seq=-(-int(model.max_model_len) // block_size),
        dtype=dtype,
        int32_position_ids=True,
        tokens_per_row=tokens_per_row,
    )


def interleaves_indexer_rope(model_config: ModelConfig) -> bool:
    """Return the pairing of the indexer's RoPE: True = (2j, 2j + 1), False = (j, j + dim / 2).

    FD_DSA_INDEXER_ROPE_INTERLEAVE decides, else the model's own `indexer_rope_interleave`, else its
    family. FastDeploy interleaves for all models (`layers/rotary_embedding.py`).
    """
    asked = switch("FD_DSA_INDEXER_ROPE_INTERLEAVE")
    if asked is not None:
        return asked
    by_model = getattr(model_config, "indexer_rope_interleave", None)
    if by_model is None:
        by_model = FAMILIES[model_config.model_type].defaults.indexer_rope_interleave
    return bool(by_model)


def shares_selection(fd_config: FDConfig, layer_id: int) -> bool:
    """Return True if a layer shares the selection of an earlier indexer, as in GLM-5.2.

    Raises:
        ConfigError: a schedule of indexers that no released model has.
    """
    model = fd_config.model_config
    schedule = {name: getattr(model, name, None) for name in _SCHEDULE}
    known = {name: value for name, value in schedule.items() if value is not None}
    if not known or fd_config.speculative_config.model_type == "mtp":
        return False
    reader = FieldReader(known, "config.json")
    defaults = FAMILIES[model.model_type].defaults
    types = read_indexer_types(reader, int(model.num_hidden_layers), defaults)
    return types[layer_id] == "shared"
