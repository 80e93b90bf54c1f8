"""Experts of DeepSeek-V4 on a device, selected by token id or by score."""

from __future__ import annotations

from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.moe import routed_on_device
from fd_dsa.ops.expert_kernels import choose_experts
from fd_dsa.ops.expert_tables import look_up_experts
from fd_dsa.tensor import Normed, Tensor

_PARTS = ("w1", "w3", "w2")


class DeviceV4MoE:
    """Routed experts plus the shared expert, with clamped activations."""

    def __init__(
        self, config: DeepseekV4Config, layer_id: int, weights: DeviceWeights, prefix: str
    ) -> None:
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self._limit, count = float(config.swiglu_limit), config.n_routed_experts
        self._top_k = config.num_experts_per_tok
        self._score, self._scaling = config.scoring_func, float(config.routed_scaling_factor)
        parts = {f"{prefix}gate.weight": count}
        self._gate = weights.matrix(hidden, parts, sums_in_float32=True)
        self._by_id: Tensor | None = None
        self._bias: Tensor | None = None
        if config.mlp_layer_types[layer_id] == "hash_moe":
            table = config.vocab_size, self._top_k, count
            self._by_id = weights.ids(f"{prefix}gate.tid2eid", *table)
        else:
            self._bias = weights.vector({f"{prefix}gate.bias": count})
        self._experts = weights.experts(f"{prefix}experts.", count, hidden, width, _PARTS)
        gate, up, down = (f"{prefix}shared_experts.{name}.weight" for name in _PARTS)
        self._shared_in = weights.matrix(hidden, {gate: width, up: width})
        self._shared_out = weights.matrix(width, {down: hidden})

    def forward(self, x: Tensor | Normed, token_ids: Tensor, slot_mapping: Tensor) -> Tensor:
        """Return the output [num_tokens, hidden_size] of an input of the same shape.

        Args:
            token_ids: integers [num_tokens].
            slot_mapping: integers [num_tokens], below 0 for padding, which has no routed experts.
        """
        out = self._shared_out
        inner, logits = self._shared_in.matmul_beside(x, self._gate, out, self._limit)
        shared = out.matmul(inner)
        if self._by_id is not None:
            choice = look_up_experts(
                logits,
                self._by_id,
                token_ids,
                slot_mapping,
                scaling=self._scaling,
                score=self._score,
            )
        else:
            assert self._bias is not None
            choice = choose_experts(
                logits,
                self._bias,
                top_k=self._top_k,
                n_group=1,
                topk_group=1,
                norm=True,
                scaling=self._scaling,
                slot_mapping=slot_mapping,
                score=self._score,
            )
        return routed_on_device(x, shared, choice, self._experts, self._limit)
