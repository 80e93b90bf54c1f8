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

    def __init__(self, fd_config: Any, intermediate_size: int, prefix: str = "") -> None:
        super().__init__()
        hidden = fd_config.model_config.hidden_size
        self.up_gate_proj = MergedColumnParallelLinear(
            fd_config=fd_config,
            prefix=f"{prefix}.up_gate_proj",
            input_size=hidden,
            output_size=2 * intermediate_size,
        )
        self.down_proj = RowParallelLinear(
            fd_config=fd_config,
            prefix=f"{prefix}.down_proj",
            input_size=intermediate_size,
            output_size=hidden,
        )

    def forward(self, x: Any, forward_meta: Any = None) -> Any:
        gate, up = paddle.chunk(self.up_gate_proj(x), 2, axis=-1)
        return self.down_proj(functional.silu(gate) * up)


class DeepSeekV3MoE(nn.Layer):
    """Routed experts and the shared one."""

    def __init__(self, fd_config: Any, layer_id: int, prefix: str) -> None:
        super().__init__()
        config = fd_config.model_config
        self.gate = ReplicatedLinear(
            fd_config=fd_config,
            prefix=f"{prefix}.gate",
            input_size=config.hidden_size,
            output_size=config.n_routed_experts,
            skip_quant=True,
            weight_dtype="float32",
        )
        self.experts = FusedMoE(
            fd_config=fd_config,
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_intermediate_size,
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            renormalize=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            n_group=config.n_group,
            topk_group=config.topk_group,
            layer_idx=layer_id,
        )
        self.shared_experts = DeepSeekV3MLP(
            fd_config,
            config.n_shared_experts * config.moe_intermediate_size,
            f"{prefix}.shared_experts",
        )

    def forward(self, hidden_states: Any, forward_meta: Any) -> Any:
        shared = self.shared_experts(hidden_states)
        return self.experts(hidden_states, self.gate, forward_meta) + shared
