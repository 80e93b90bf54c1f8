"""Which class serves which `model_type`."""

from __future__ import annotations

import paddle

from fd_dsa.models.config import ModelConfig
from fd_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM

MODELS: dict[str, type[DeepseekV32ForCausalLM]] = {
    "deepseek_v32": DeepseekV32ForCausalLM,
    # GLM-5's decoder has other sizes, interleaved pairs in the indexer's RoPE and, with IndexShare,
    # layers without an indexer: all of it configuration
    "glm_moe_dsa": DeepseekV32ForCausalLM,
}


def create_model(config: ModelConfig) -> DeepseekV32ForCausalLM:
    """The model of `config` in host memory, its parameters zeros until weights are loaded."""
    before = paddle.device.get_device()
    # Paddle would make parameters on its own device, loaders fill them on the host
    paddle.set_device("cpu")
    try:
        return MODELS[config.model_type](config)
    finally:
        paddle.set_device(before)
