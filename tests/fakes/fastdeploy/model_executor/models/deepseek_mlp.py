"""The MLPs of a DeepSeek layer (`model_executor/models/deepseek_v3.py`)."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional

from fastdeploy.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from fastdeploy.model_executor.layers.moe import FusedMoE


class DeepSeekV3MLP(nn.Layer):
    """Dense FFN and shared expert."""

    def __init__(self, fd_config: Any, intermediate_size: int) -> None:
        super().__init__()
        hidden = fd_config.model_config.hidden_size
        self.up_gate_proj = MergedColumnParallelLinear(fd_config, hidden, 2 * intermediate_size)
        self.down_proj = RowParallelLinear(fd_config, intermediate_size, hidden)

    def forward(self, x: Any, forward_meta: Any = None) -> Any:
        gate, up = paddle.chunk(self.up_gate_proj(x), 2, axis=-1)
        return self.down_proj(functional.silu(gate) * up)


class DeepSeekV3MoE(nn.Layer):
    """Routed experts and the shared one."""

    def __init__(self, fd_config: Any) -> None:
        super().__init__()
        config = fd_config.model_config
        self.gate = ReplicatedLinear(
            fd_config,
            config.hidden_size,
            config.n_routed_experts,
            skip_quant=True,
            weight_dtype="float32",
        )
        self.experts = FusedMoE(config)
        shared_size = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = DeepSeekV3MLP(fd_config, shared_size)

    def forward(self, hidden_states: Any, forward_meta: Any) -> Any:
        shared = self.shared_experts(hidden_states)
        return self.experts(hidden_states, self.gate, forward_meta) + shared
