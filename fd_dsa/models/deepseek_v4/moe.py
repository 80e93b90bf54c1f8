"""DeepSeek-V4's experts: chosen by token id or by score, with clamped activations."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.deepseek_v4.hyper import sigmoid
from fd_dsa.models.moe import NoAuxTopkGate, add_routed


class ClampedMLP:
    """down(silu(min(gate, limit)) * clip(up, -limit, limit)); the gate has no lower bound.

    Args:
        config: the model.
        weights: make what is asked for.
        prefix: of the checkpoint's names.
    """

    def __init__(self, config: DeepseekV4Config, weights: Any, prefix: str) -> None:
        hidden, self._width = config.hidden_size, config.moe_intermediate_size
        self._limit = np.float32(config.swiglu_limit)
        parts = {f"{prefix}w1.weight": self._width, f"{prefix}w3.weight": self._width}
        self._gate_up = weights.matrix(hidden, parts)
        self._down = weights.matrix(self._width, {f"{prefix}w2.weight": hidden})

    def forward(self, x: np.ndarray) -> np.ndarray:
        """[num_tokens, hidden_size] of the same."""
        gate_up: np.ndarray = self._gate_up.times(x)
        np.minimum(gate_up, self._limit, out=gate_up)
        up = gate_up[:, self._width :]
        np.maximum(up, -self._limit, out=up)
        out: np.ndarray = self._down.times(self._down.activated(gate_up))
        return out


class V4Gate:
    """Experts of each token and their weights: by a table of token ids, or by the best scores.

    The bias counts for the choice alone. The chosen scores are normalised whatever the function.

    Args:
        config: the model.
        layer_id: index of the layer; its kind says what chooses.
        weights: make what is asked for.
        prefix: of the checkpoint's names.
    """

    def __init__(self, config: DeepseekV4Config, layer_id: int, weights: Any, prefix: str) -> None:
        self._top_k, count = config.num_experts_per_tok, config.n_routed_experts
        self._scaling = np.float32(config.routed_scaling_factor)
        self._scores = _SCORES[config.scoring_func]
        self._weight = weights.matrix(
            config.hidden_size, {f"{prefix}weight": count}, sums_in_float32=True
        )
        self._by_id = self._bias = None
        if config.mlp_layer_types[layer_id] == "hash_moe":
            table = config.vocab_size, self._top_k, count
            self._by_id = weights.ids(f"{prefix}tid2eid", *table)
        else:
            self._bias = weights.vector({f"{prefix}bias": count})

    def forward(self, x: np.ndarray, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Experts int32 [num_tokens, top_k], ascending, and their weights, float32, same shape."""
        scores = self._scores(self._weight.times(x))
        if self._by_id is not None:
            # ascending, as those of scores: the order of sums does not depend on the company
            experts = np.sort(self._by_id[token_ids], axis=1)
        else:
            experts = NoAuxTopkGate.best(scores + self._bias, self._top_k)
        weights = np.take_along_axis(scores, experts, axis=1)
        weights /= weights.sum(axis=1, keepdims=True) + np.float32(1e-20)
        return experts, weights * self._scaling

    def repeats(self, experts: np.ndarray) -> bool:
        """Whether a token may have an expert twice, which then counts twice."""
        if self._by_id is None:
            return False
        return bool((experts[:, 1:] == experts[:, :-1]).any())


class V4MoE:
    """Routed experts plus the shared expert.

    Args:
        config: the model.
        layer_id: index of the layer.
        weights: make what is asked for.
        prefix: of the checkpoint's names.
    """

    def __init__(self, config: DeepseekV4Config, layer_id: int, weights: Any, prefix: str) -> None:
        self._gate = V4Gate(config, layer_id, weights, f"{prefix}gate.")
        self._shared = ClampedMLP(config, weights, f"{prefix}shared_experts.")
        self._experts = [
            ClampedMLP(config, weights, f"{prefix}experts.{j}.")
            for j in range(config.n_routed_experts)
        ]

    def forward(self, x: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """[num_tokens, hidden_size] of the same, for tokens of these ids."""
        out = self._shared.forward(x)
        experts, weights = self._gate.forward(x, token_ids)
        if self._gate.repeats(experts):
            for column in range(experts.shape[1]):
                pair = slice(column, column + 1)
                add_routed(out, x, experts[:, pair], weights[:, pair], self._experts)
        else:
            add_routed(out, x, experts, weights, self._experts)
        return out


_SCORES = {
    "sqrtsoftplus": lambda logits: np.sqrt(np.logaddexp(np.float32(0.0), logits)),
    "sigmoid": sigmoid,
}
