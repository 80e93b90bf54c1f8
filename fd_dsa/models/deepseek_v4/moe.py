"""Experts of DeepSeek-V4, selected by token id or by score."""

from __future__ import annotations

import numpy as np

from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.moe import NoAuxTopkGate, routed, sigmoid
from fd_dsa.models.weights_protocol import HostOnlyWeights

_ONE = np.float32(1.0)


class V4Gate:
    """Router that selects experts by a table of token ids, or by score.

    The bias changes only the selection. The selected scores are normalised for every scoring
    function.
    """

    def __init__(
        self, config: DeepseekV4Config, layer_id: int, weights: HostOnlyWeights, prefix: str
    ) -> None:
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
        """Select the experts of each token.

        Returns:
            Experts int32 [num_tokens, top_k], ascending, and their weights, float32, same shape.
        """
        scores = self._scores(self._weight.matmul(x))
        if self._by_id is not None:
            # ascending, so that the order of sums does not depend on the batch composition
            experts = np.sort(self._by_id.take(token_ids, axis=0), axis=1)
        else:
            experts = NoAuxTopkGate.best(scores + self._bias, self._top_k)
        weights = scores[np.arange(len(x))[:, None], experts]
        weights /= weights.sum(axis=1, keepdims=True) + np.float32(1e-20)
        return experts, weights * self._scaling


class V4MoE:
    """Routed experts plus the shared expert."""

    def __init__(
        self, config: DeepseekV4Config, layer_id: int, weights: HostOnlyWeights, prefix: str
    ) -> None:
        self._gate = V4Gate(config, layer_id, weights, f"{prefix}gate.")
        hidden, self._width = config.hidden_size, config.moe_intermediate_size
        self._limit = np.float32(config.swiglu_limit)
        self._shared = config.n_routed_experts
        self._experts = []
        for name in (*(f"experts.{j}" for j in range(self._shared)), "shared_experts"):
            one = f"{prefix}{name}."
            parts = {f"{one}w1.weight": self._width, f"{one}w3.weight": self._width}
            gate_up = weights.matrix(hidden, parts)
            down = weights.matrix(self._width, {f"{one}w2.weight": hidden})
            self._experts.append((gate_up, down))

    def forward(self, x: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """Return the output [num_tokens, hidden_size] of an input of the same shape."""
        experts, weights = self._gate.forward(x, token_ids)
        shape = len(x), experts.shape[1] + 1
        # every token selects the shared expert
        selected, factors = np.full(shape, self._shared, np.int32), np.ones(shape, np.float32)
        selected[:, :-1], factors[:, :-1] = experts, weights
        return routed(x, selected, factors, self._experts, self._activated)

    def _activated(self, gate_up: np.ndarray) -> np.ndarray:
        """Return silu(min(gate, limit)) * clip(up, -limit, limit)."""
        # clip takes a third of the time of a minimum
        gate = gate_up[:, : self._width].clip(-np.inf, self._limit)
        up = gate_up[:, self._width :].clip(-self._limit, self._limit)
        divisor = np.negative(gate)
        np.exp(divisor, out=divisor)
        divisor += _ONE
        gate /= divisor
        gate *= up
        return gate


def _softplus(x: np.ndarray) -> np.ndarray:
    """Return log(1 + exp(x)), eight times as fast as logaddexp."""
    return np.log1p(np.exp(-np.abs(x))) + np.clip(x, 0.0, np.inf)


_SCORES = {
    "sqrtsoftplus": lambda logits: np.sqrt(_softplus(logits)),
    "sigmoid": sigmoid,
}
