"""RMSNorm and LayerNorm with FastDeploy's signatures (`model_executor/layers/normalization.py`)."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from .utils import default_weight_loader, zeros_parameter


class RMSNorm(nn.Layer):
    """x * rsqrt(mean(x^2) + eps) * weight; adds a residual first where one is given.

    The weight has the model's dtype, bfloat16, also where all else of the double is float32.
    """

    def __init__(self, fd_config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.weight = zeros_parameter(self, [hidden_size], "bfloat16")
        self.weight.weight_loader = default_weight_loader

    def forward(
        self, x: Any, residual_input: Any = None, forward_meta: Any = None
    ) -> tuple[Any, Any]:
        """The normed sum of `x` and the residual, and that sum: always two."""
        total = x if residual_input is None else x + residual_input
        mean_square = (total * total).mean(axis=-1, keepdim=True)
        weight = self.weight.astype(total.dtype)
        return total * paddle.rsqrt(mean_square + self.eps) * weight, total


class LayerNorm(nn.Layer):
    """(x - mean) * rsqrt(variance + eps) * weight + bias, its parameters in float32."""

    def __init__(self, fd_config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.weight = zeros_parameter(self, [hidden_size], "float32")
        self.bias = zeros_parameter(self, [hidden_size], "float32")
        self.weight.weight_loader = self.bias.weight_loader = default_weight_loader

    def forward(self, x: Any) -> Any:
        """The normed tensor alone."""
        wide = x.astype("float32")
        wide = wide - wide.mean(axis=-1, keepdim=True)
        variance = (wide * wide).mean(axis=-1, keepdim=True)
        return (wide * paddle.rsqrt(variance + self.eps) * self.weight + self.bias).astype(x.dtype)
