"""The layer for multi-token prediction (MTP) of a checkpoint, as part of the configuration."""

from __future__ import annotations

from fd_dsa.errors import flag_error
from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.deepseek_v4.tensors import DSPARK, MTP_TOKENS
from fd_dsa.models.loader import LAYER
from fd_dsa.models.registry import FamilyConfig
from fd_dsa.models.sources import EMBEDDING, LM_HEAD, MTP_EMBEDDING, MTP_HEAD, MTP_JOIN


def add_mtp_layer(checkpoint: Checkpoint | None, config: FamilyConfig) -> FamilyConfig:
    """Return the configuration with the MTP layer of a checkpoint.

    Embedding and head of a layer of DeepSeek-V3.2 are often copies of the model's, which are then
    used instead. A layer of DeepSeek-V4 has neither.

    Args:
        checkpoint: None = random weights.

    Raises:
        ConfigError: the model has no MTP layer.
    """
    names, lack = checkpoint.names() if checkpoint else (), ""
    prefix = f"model.layers.{config.num_hidden_layers}."
    join = MTP_TOKENS if isinstance(config, DeepseekV4Config) else prefix + MTP_JOIN
    if config.num_nextn_predict_layers == 0:
        lack = "config.json says that there is no layer for it (num_nextn_predict_layers 0)"
    elif DSPARK in names:
        lack = f"the drafter of the checkpoint is DSpark ({DSPARK!r}), which is not served"
    elif checkpoint is not None and join not in names:
        last = max((int(match[1]) for name in names if (match := LAYER.match(name))), default=0)
        lack = f"the checkpoint has layers 0 to {last}, and no tensor {join!r}"
    if lack:
        raise flag_error("speculative_config.method", "mtp", "ngram", lack)
    if isinstance(config, DeepseekV4Config):
        return config.with_mtp_layer()
    head, own = EMBEDDING if config.tie_word_embeddings else LM_HEAD, []
    for table, shared in ((MTP_EMBEDDING, EMBEDDING), (MTP_HEAD, head)):
        name = prefix + table
        if checkpoint is not None and name in names and not checkpoint.are_equal(name, shared):
            own.append(table)
    return config.with_mtp_layer(*own)
