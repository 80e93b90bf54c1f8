"""Everything of the model but attention: embedding, MLPs, experts, and how weights get in by name.

The plug-in leaves these layers alone, so they are as simple as can be: parameters have the names of
a checkpoint, every expert sees every token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional

from fastdeploy.model_executor.layers.linear import RowParallelLinear
from fastdeploy.model_executor.layers.utils import default_weight_loader, zeros_parameter

# one parameter of two tensors
_MERGED = {"q_a_proj": "q_a", "kv_a_proj_with_mqa": "kv_a"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Embedding(nn.Layer):
    """Rows of a table by token id."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = zeros_parameter(self, [num_rows, width])

    def forward(self, ids: Any) -> Any:
        """[num_tokens, width] of int64 [num_tokens]."""
        return functional.embedding(ids, self.weight)


class Mlp(nn.Layer):
    """Dense FFN, and one expert."""

    def __init__(self, fd_config: Any, width: int) -> None:
        super().__init__()
        hidden = fd_config.model_config.hidden_size
        self.gate_proj = RowParallelLinear(fd_config, hidden, width)
        self.up_proj = RowParallelLinear(fd_config, hidden, width)
        self.down_proj = RowParallelLinear(fd_config, width, hidden)

    def forward(self, x: Any) -> Any:
        """[num_tokens, hidden] of the same."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Layer):
    """Routed experts, chosen by sigmoid score plus correction bias, and the shared one."""

    def __init__(self, fd_config: Any) -> None:
        super().__init__()
        config = self.config = fd_config.model_config
        width, count = config.moe_intermediate_size, config.n_routed_experts
        self.gate = RowParallelLinear(fd_config, config.hidden_size, count, weight_dtype="float32")
        self.gate.e_score_correction_bias = zeros_parameter(self.gate, [count], "float32")
        self.experts = nn.LayerList([Mlp(fd_config, width) for _ in range(count)])
        self.shared_experts = Mlp(fd_config, config.n_shared_experts * width)

    def forward(self, x: Any) -> Any:
        """[num_tokens, hidden] of the same; ties go to the lower expert id."""
        scores = functional.sigmoid(self.gate(x.astype("float32")))
        choice = scores + self.gate.e_score_correction_bias
        order = paddle.argsort(choice, axis=1, descending=True, stable=True)
        chosen = paddle.argsort(order, axis=1) < self.config.num_experts_per_tok
        weights = scores * chosen.astype("float32")
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(axis=1, keepdim=True) + 1e-20)
        weights = weights * float(self.config.routed_scaling_factor)
        out = self.shared_experts(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * weights[:, number : number + 1].astype(x.dtype)
        return out


def load_into(model: nn.Layer, weights: Iterable[tuple[str, np.ndarray]]) -> None:
    """Fill the parameters of a model from a checkpoint's names and float32 arrays.

    A tensor without a parameter is a KeyError, unless it belongs to a layer past the model's.
    """
    parameters = dict(model.named_parameters())
    found = filter(None, map(_LAYER.match, parameters))
    last_layer = max((int(match[1]) for match in found), default=-1)
    for name, array in weights:
        layer = _LAYER.match(name)
        if layer and int(layer[1]) > last_layer:
            continue
        part = name.split(".")[-2]
        shard = _MERGED.get(part)
        target = name.replace(f"{part}.", "qkv_a_proj_with_mqa.") if shard else name
        parameter = parameters[target]
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        loader(parameter, array, shard)
    for one in model.sublayers():
        if hasattr(one, "process_weights_after_loading"):
            one.process_weights_after_loading()
