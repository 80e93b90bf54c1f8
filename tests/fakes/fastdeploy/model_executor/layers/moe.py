"""Routed experts (`model_executor/layers/moe/moe.py`): every expert on every token.

The gate chooses by sigmoid score plus correction bias and weighs by the score alone, ties to the
lower expert id. With few and small experts, as tests have, the one batched product is cheap and
nothing has to be read back to know which experts have tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional

from .utils import fill, loader_of, zeros_parameter

_UP_GATE = ("gate", "up")


class FusedMoE(nn.Layer):
    """Parameters `up_gate_proj_weight`, `down_proj_weight` and `gate_correction_bias`."""

    def __init__(self, model_config: Any) -> None:
        super().__init__()
        if model_config.n_group != 1:
            raise NotImplementedError("the double has no expert groups")
        self.num_experts = model_config.n_routed_experts
        self.top_k = model_config.num_experts_per_tok
        self.renormalize = model_config.norm_topk_prob
        self.scaling = model_config.routed_scaling_factor
        num_experts, hidden_size = self.num_experts, model_config.hidden_size
        width = model_config.moe_intermediate_size
        self.up_gate_proj_weight = zeros_parameter(self, [num_experts, hidden_size, 2 * width])
        self.down_proj_weight = zeros_parameter(self, [num_experts, width, hidden_size])
        self.gate_correction_bias = zeros_parameter(self, [1, num_experts], "float32")
        self.up_gate_proj_weight.weight_loader = loader_of(self)
        self.down_proj_weight.weight_loader = loader_of(self)
        self.gate_correction_bias.weight_loader = lambda param, array, shard_id=None: fill(
            param, array.reshape(1, -1)
        )

    def weight_loader(
        self, param: Any, array: np.ndarray, shard_id: str = "down", expert_id: int = 0
    ) -> None:
        """Collect one expert's projection; the stack is filled when all have come."""
        found = self.__dict__.setdefault("_shards", {}).setdefault(param.name, {})
        found[expert_id, shard_id] = array.T
        if shard_id == "down":
            if len(found) == self.num_experts:
                stack = np.stack([found[i, "down"] for i in range(self.num_experts)])
                fill(param, stack)
                found.clear()
        elif len(found) == len(_UP_GATE) * self.num_experts:
            rows = [[found[i, one] for one in _UP_GATE] for i in range(self.num_experts)]
            fill(param, np.stack([np.concatenate(row, axis=1) for row in rows]))
            found.clear()

    def _expert_weights(self, scores: Any) -> tuple[Any, Any]:
        """Weight of each expert for each token, and whether it is chosen, [tokens, experts]."""
        choice = scores + self.gate_correction_bias
        order = paddle.argsort(choice, axis=1, descending=True, stable=True)
        chosen = paddle.argsort(order, axis=1) < self.top_k
        weights = paddle.where(chosen, scores, paddle.zeros_like(scores))
        if self.renormalize:
            weights = weights / (weights.sum(axis=1, keepdim=True) + 1e-20)
        return weights * float(self.scaling), chosen

    def forward(self, x: Any, gate: nn.Layer, forward_meta: Any = None) -> Any:
        """Weighted sum of the chosen experts, [num_tokens, hidden]."""
        weights, chosen = self._expert_weights(functional.sigmoid(gate(x.astype("float32"))))
        hidden = paddle.matmul(x.unsqueeze(0), self.up_gate_proj_weight)
        first, second = paddle.chunk(hidden, 2, axis=-1)
        out = paddle.matmul(functional.silu(first) * second, self.down_proj_weight)
        share = out * weights.transpose([1, 0]).unsqueeze(2).astype(out.dtype)
        seen = chosen.transpose([1, 0]).unsqueeze(2)
        return paddle.where(seen, share, paddle.zeros_like(share)).sum(axis=0)
