"""Which classes serve which `model_type`."""

from __future__ import annotations

import os
from typing import Any

import paddle

from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.config import ModelConfig, read_folder
from fd_dsa.models.config_reader import FieldReader
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.deepseek_v4.model import DeepseekV4ForCausalLM
from fd_dsa.models.deepseek_v4.tensors import tensor_name
from fd_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM
from fd_dsa.models.families import OTHER_FAMILIES
from fd_dsa.models.weights import HostWeights

MODELS: dict[str, type[Any]] = {
    "deepseek_v32": DeepseekV32ForCausalLM,
    # GLM-5's decoder has other sizes, interleaved pairs in the indexer's RoPE and, with IndexShare,
    # layers without an indexer: all of it configuration
    "glm_moe_dsa": DeepseekV32ForCausalLM,
    "deepseek_v4": DeepseekV4ForCausalLM,
}
# of models whose configuration is no ModelConfig
CONFIGS: dict[str, type[DeepseekV4Config]] = {"deepseek_v4": DeepseekV4Config}
# of models whose checkpoints come with different names
_NAMES = {"deepseek_v4": tensor_name}


def read_config(folder: str | os.PathLike[str]) -> Any:
    """Configuration of the model in a folder, of its family's class; see `ModelConfig`."""
    data, source, *generation = read_folder(folder)
    if "model_type" in data:
        FieldReader(data, source).choice("model_type", None, tuple(MODELS), OTHER_FAMILIES)
    config_class = CONFIGS.get(data.get("model_type", ""), ModelConfig)
    return config_class.from_dict(data, source, *generation)


def open_checkpoint(config: Any, folder: str | os.PathLike[str]) -> Checkpoint:
    """The weights in a model's folder, by the names of `expected_tensors`."""
    return Checkpoint.open(folder, _NAMES.get(config.model_type))


def create_model(config: Any, weights: Any = None) -> Any:
    """The model of `config`, its weights empty until `loaders` have filled them.

    Args:
        config: of the model.
        weights: what makes them; None: HostWeights.
    """
    before = paddle.device.get_device()
    # Paddle would make tensors on its own device
    paddle.set_device("cpu")
    try:
        return MODELS[config.model_type](config, weights or HostWeights())
    finally:
        paddle.set_device(before)
