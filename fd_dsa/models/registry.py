"""Which classes serve which `model_type`; Paddle is imported when one is created."""

from __future__ import annotations

from typing import Any

from fd_dsa.models.deepseek_v4.model import DeepseekV4ForCausalLM
from fd_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM

MODELS: dict[str, type[Any]] = {
    "deepseek_v32": DeepseekV32ForCausalLM,
    # GLM-5's decoder has other sizes, interleaved pairs in the indexer's RoPE and, with IndexShare,
    # layers without an indexer: all of it configuration
    "glm_moe_dsa": DeepseekV32ForCausalLM,
    "deepseek_v4": DeepseekV4ForCausalLM,
}


def create_model(config: Any, weights: Any = None) -> Any:
    """The model of `config`, its weights empty until `loaders` have filled them."""
    import paddle

    from fd_dsa.models.weights import HostWeights

    before = paddle.device.get_device()
    # Paddle would make tensors on its own device
    paddle.set_device("cpu")
    try:
        return MODELS[config.model_type](config, weights or HostWeights())
    finally:
        paddle.set_device(before)
