"""Routed experts on a device: every expert on every token, and nothing read back.

Which experts have tokens is known on the device alone. Reading it back would cost a wait in every
layer, so all experts run as one batched product and the gate selects what counts. That takes
`n_routed_experts / num_experts_per_tok` times the work of the chosen experts: right for few
experts and for decoding, where reading the weights is the cost, and wasteful for long prompts of
a model with hundreds of experts, which needs a grouped product.
"""

from __future__ import annotations

from typing import Any

import paddle

from fd_dsa.ops._dense_kernels import silu_and_mul
from fd_dsa.ops._expert_kernels import choose_experts, sum_experts

EXPERT_BYTES = 256 << 20
"""Most memory for one activation of all experts; the tokens of a longer step come in chunks."""


def routed(layer: Any, x: Any) -> Any:
    """Weighted sum of the chosen experts, float32 [num_tokens, hidden_size].

    Args:
        layer: a DeepseekMoE whose weights are on the device of `x`.
        x: float32 [num_tokens, hidden_size].
    """
    widest = max(2 * layer.intermediate_size, x.shape[1])
    rows = max(1, EXPERT_BYTES // (4 * layer.num_experts * widest))
    if x.shape[0] <= rows:
        return _routed_chunk(layer, x)
    chunks = range(0, x.shape[0], rows)
    return paddle.concat([_routed_chunk(layer, x[i : i + rows]) for i in chunks])


def _routed_chunk(layer: Any, x: Any) -> Any:
    """See `routed`; all tokens at once."""
    weights, chosen = expert_weights(layer.gate, x)
    rows = x.reshape([1, *x.shape])
    hidden = silu_and_mul(paddle.matmul(rows, layer.experts_gate_up_proj))
    return sum_experts(paddle.matmul(hidden, layer.experts_down_proj), weights, chosen)


def expert_weights(gate: Any, x: Any) -> tuple[Any, Any]:
    """float32 and uint8 [num_tokens, num_experts]: weight of each expert, and whether it is chosen.

    Args:
        gate: a NoAuxTopkGate, whose rules are these.
        x: float32 [num_tokens, hidden_size].
    """
    return choose_experts(
        paddle.matmul(x, gate.weight),
        gate.readable_bias,
        top_k=gate.top_k,
        n_group=gate.n_group,
        topk_group=gate.topk_group,
        norm=gate.norm_topk_prob,
        scaling=float(gate.scaling),
    )
