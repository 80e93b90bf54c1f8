"""Configuration and checkpoint of any model that is served, by its `model_type`; no Paddle."""

from __future__ import annotations

import os
from typing import Any

from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.config import ModelConfig, read_folder
from fd_dsa.models.config_reader import FieldReader
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.deepseek_v4.tensors import tensor_name
from fd_dsa.models.families import FAMILIES, check_family

# of models whose configuration is no ModelConfig
CONFIGS: dict[str, type[DeepseekV4Config]] = {"deepseek_v4": DeepseekV4Config}
# of models whose checkpoints come with different names
_NAMES = {"deepseek_v4": tensor_name}


def read_config(folder: str | os.PathLike[str], *, allow_unknown: bool = False) -> Any:
    """Configuration of the model in a folder, of its family's class.

    Args:
        allow_unknown: as of `ModelConfig.from_dict`.

    Raises:
        ConfigError: as of `ModelConfig.from_folder`.
    """
    data, source, *generation = read_folder(folder)
    model_type = check_family(FieldReader(data, source), (*FAMILIES, *CONFIGS))
    config_class = CONFIGS.get(model_type, ModelConfig)
    return config_class.from_dict(data, source, *generation, allow_unknown=allow_unknown)


def open_checkpoint(config: Any, folder: str | os.PathLike[str]) -> Checkpoint:
    """The weights in a model's folder, by the names of `expected_tensors`."""
    return Checkpoint.open(folder, _NAMES.get(config.model_type))
