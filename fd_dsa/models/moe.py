"""The MLPs: dense, shared expert and routed experts with the noaux_tc gate."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import paddle
from paddle import nn

from fd_dsa.attention.layers import WeightLoader, loads, zeros_parameter
from fd_dsa.models.config import ModelConfig
from fd_dsa.ops._gemm import matrix
from fd_dsa.ops._host import on_device, readable
from fd_dsa.ops._linear import linear, silu_and_mul

EXPERT_BYTES = 256 << 20
"""On a device, most memory for an activation of the chosen experts; a longer step is cut."""


class DeepseekMLP(nn.Layer):
    """down(silu(gate(x)) * up(x)); gate and up are one GEMM."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.intermediate_size = intermediate_size
        self.gate_up_proj = zeros_parameter(self, [hidden_size, 2 * intermediate_size])
        self.down_proj = zeros_parameter(self, [intermediate_size, hidden_size])

    def forward(self, x: Any) -> Any:
        """float32 [num_tokens, hidden_size] of the same."""
        gate_up, down = self._bound
        return linear(silu_and_mul(linear(x, gate_up)), down)

    @cached_property
    def _bound(self) -> tuple[Any, Any]:
        """Both weights as GEMMs read them."""
        return matrix(self.gate_up_proj), matrix(self.down_proj)

    def weight_loaders(self, prefix: str) -> dict[str, WeightLoader]:
        """Checkpoint names below `prefix` and how each fills its parameter."""
        return _gated_loaders(prefix, self.gate_up_proj, self.down_proj)


def _gated_loaders(prefix: str, gate_up: Any, down: Any, *expert: int) -> dict[str, WeightLoader]:
    """How the three weights of a gated MLP fill two parameters, or those of one expert in them."""
    width = gate_up.shape[-1] // 2
    columns = {"gate_proj": slice(0, width), "up_proj": slice(width, None)}
    loaders = {
        f"{prefix}{name}.weight": loads(gate_up, *expert, slice(None), part, transpose=True)
        for name, part in columns.items()
    }
    loaders[f"{prefix}down_proj.weight"] = loads(down, *expert, ..., transpose=True)
    return loaders


class NoAuxTopkGate(nn.Layer):
    """Chooses experts by sigmoid score plus a correction bias, weighs them by the score alone.

    With expert groups, a group counts by its two best experts and only the best `topk_group`
    groups take part. Equal scores: the lower expert id.

    Source: DeepSeek-V3 (arXiv 2412.19437) §2.1.2; Hugging Face transformers 5.23
    (DeepseekV32TopkRouter).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.n_routed_experts
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.scaling = np.float32(config.routed_scaling_factor)
        self.weight = zeros_parameter(self, [config.hidden_size, self.num_experts])
        self.e_score_correction_bias = zeros_parameter(self, [self.num_experts])

    @cached_property
    def _matrix(self) -> Any:
        return matrix(self.weight)

    @cached_property
    def readable_bias(self) -> Any:
        """The correction bias as the operators read it."""
        return readable(self.e_score_correction_bias)

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Experts int32 [num_tokens, top_k], ascending, and their weights, float32, same shape."""
        logits = linear(x, self._matrix)
        with np.errstate(over="ignore"):
            scores = np.float32(1.0) / (np.float32(1.0) + np.exp(-logits))
        choice = scores + self.readable_bias
        if self.n_group > 1:
            choice = self._keep_best_groups(choice)
        experts = self._best(choice, self.top_k)
        weights = np.take_along_axis(scores, experts, axis=1)
        if self.norm_topk_prob:
            weights /= weights.sum(axis=1, keepdims=True) + np.float32(1e-20)
        return experts, weights * self.scaling

    def _keep_best_groups(self, choice: np.ndarray) -> np.ndarray:
        """`choice` with the experts of all but the best `topk_group` groups at -inf."""
        grouped = choice.reshape(len(choice), self.n_group, -1)
        pair = np.partition(grouped, grouped.shape[2] - 2, axis=2)[:, :, -2:]
        kept = np.zeros((len(choice), self.n_group), bool)
        groups = self._best(np.ascontiguousarray(pair.sum(axis=2)), self.topk_group)
        np.put_along_axis(kept, groups, True, axis=1)
        return np.where(kept[:, :, None], grouped, np.float32(-np.inf)).reshape(choice.shape)

    @staticmethod
    def _best(scores: np.ndarray, k: int) -> np.ndarray:
        """int32 columns of the k largest scores of each row, ascending; ties to the lower one."""
        best = np.negative(scores).argsort(axis=1, kind="stable")[:, :k].astype(np.int32)
        best.sort(axis=1)
        return best


class DeepseekMoE(nn.Layer):
    """Routed experts plus the shared expert, accumulated in float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.intermediate_size, self.num_experts = width, config.n_routed_experts
        self.gate = NoAuxTopkGate(config)
        self.experts_gate_up_proj = zeros_parameter(self, [self.num_experts, hidden, 2 * width])
        self.experts_down_proj = zeros_parameter(self, [self.num_experts, width, hidden])
        self.shared_experts = DeepseekMLP(hidden, width * config.n_shared_experts)

    def forward(self, x: Any) -> Any:
        """float32 [num_tokens, hidden_size] of the same."""
        gate, shared, experts = self._bound
        out = shared.forward(x)
        if experts is None:
            return out + routed_on_device(self, x)
        _add_routed(out, x, *gate.forward(x), experts)
        return out

    @cached_property
    def _bound(self) -> tuple[Any, Any, list[tuple[Any, Any]] | None]:
        """Gate, shared experts, and (gate_up, down) of each expert; on a device none of these."""
        stacks = self.experts_gate_up_proj.detach(), self.experts_down_proj.detach()
        experts = None
        if not on_device(stacks[0]):
            experts = [
                (matrix(stacks[0][i]), matrix(stacks[1][i])) for i in range(self.num_experts)
            ]
        return self.gate, self.shared_experts, experts

    @cached_property
    def readable_experts(self) -> tuple[Any, Any]:
        """The weights of all experts as the operators read them."""
        return readable(self.experts_gate_up_proj), readable(self.experts_down_proj)

    def weight_loaders(self, prefix: str) -> dict[str, WeightLoader]:
        """Checkpoint names below `prefix` and how each fills its parameter."""
        loaders = self.shared_experts.weight_loaders(f"{prefix}shared_experts.")
        loaders[f"{prefix}gate.weight"] = loads(self.gate.weight, transpose=True)
        loaders[f"{prefix}gate.e_score_correction_bias"] = loads(self.gate.e_score_correction_bias)
        experts = self.experts_gate_up_proj, self.experts_down_proj
        for i in range(self.num_experts):
            loaders |= _gated_loaders(f"{prefix}experts.{i}.", *experts, i)
        return loaders


def _add_routed(
    out: np.ndarray,
    x: np.ndarray,
    chosen: np.ndarray,
    weights: np.ndarray,
    experts: list[tuple[Any, Any]],
) -> None:
    """Add the chosen experts to `out`; experts without a token are not visited.

    Args:
        out, x: float32 [num_tokens, hidden_size].
        chosen, weights: of each token, as NoAuxTopkGate gives them.
        experts: (gate_up, down) of each.
    """
    if len(x) == 1:
        for expert, weight in zip(chosen[0].tolist(), weights[0], strict=True):
            gate_up, down = experts[expert]
            y = down.times(silu_and_mul(gate_up.times(x)))
            y *= weight
            out += y
        return
    order = np.argsort(chosen, axis=None, kind="stable")
    counts = np.bincount(chosen.ravel(), minlength=len(experts))
    ends = np.cumsum(counts)
    tokens = order // chosen.shape[1]
    factors = weights.ravel()[order]
    for expert in np.flatnonzero(counts):
        pairs = slice(int(ends[expert] - counts[expert]), int(ends[expert]))
        rows = tokens[pairs]
        gate_up, down = experts[expert]
        y = down.times(silu_and_mul(gate_up.times(x[rows])))
        y *= factors[pairs, None]
        # an expert meets a token at most once, so plain indexing adds every row
        out[rows] += y


def routed_on_device(layer: Any, x: Any) -> Any:
    """Weighted sum of the chosen experts, float32 [num_tokens, hidden_size]; nothing is read back.

    Which experts have tokens is known on the device alone, and reading it back would cost a wait in
    every layer: the launches list each expert's tokens there, and grids hold for any choice.

    Args:
        layer: a DeepseekMoE whose weights are on the device of `x`.
        x: float32 [num_tokens, hidden_size].
    """
    gate = layer.gate
    rows = max(1, EXPERT_BYTES // (4 * gate.top_k * max(layer.intermediate_size, x.shape[1])))
    if x.shape[0] > rows:
        chunks = range(0, x.shape[0], rows)
        return paddle.concat([routed_on_device(layer, x[i : i + rows]) for i in chunks])
    # kernels are loaded only where there is a device
    from fd_dsa.ops import _expert_kernels as kernels

    ids, weights = kernels.choose_experts(
        paddle.matmul(x, gate.weight),
        gate.readable_bias,
        top_k=gate.top_k,
        n_group=gate.n_group,
        topk_group=gate.topk_group,
        norm=gate.norm_topk_prob,
        scaling=float(gate.scaling),
    )
    pairs = kernels.group_pairs(ids, layer.num_experts)
    gate_up, down = layer.readable_experts
    hidden = kernels.expert_gemm(x, gate_up, *pairs, top_k=gate.top_k, gated=True)
    parts = kernels.expert_gemm(hidden, down, *pairs, top_k=gate.top_k)
    return kernels.sum_experts(parts, weights)
