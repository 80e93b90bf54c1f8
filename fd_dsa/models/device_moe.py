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
from paddle.nn import functional

from fd_dsa.ops._dense import silu_and_mul

EXPERT_BYTES = 256 << 20
"""Most memory for one activation of all experts; the tokens of a longer step come in chunks."""


def routed(layer: Any, x: Any) -> Any:
    """Weighted sum of the chosen experts, float32 [num_tokens, hidden_size].

    Args:
        layer: a DeepseekMoE whose weights lie on the device of `x`.
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
    hidden = silu_and_mul(paddle.matmul(x.unsqueeze(0), layer.experts_gate_up_proj))
    out = paddle.matmul(hidden, layer.experts_down_proj)
    # selected, not multiplied by 0: an expert may overflow on tokens that are not its own
    share = out * weights.transpose([1, 0]).unsqueeze(2)
    seen = chosen.transpose([1, 0]).unsqueeze(2)
    return paddle.where(seen, share, paddle.zeros_like(share)).sum(axis=0)


def expert_weights(gate: Any, x: Any) -> tuple[Any, Any]:
    """float32 and bool [num_tokens, num_experts]: weight of each expert, and whether it is chosen.

    Args:
        gate: a NoAuxTopkGate, whose rules are these.
        x: float32 [num_tokens, hidden_size].
    """
    scores = functional.sigmoid(paddle.matmul(x, gate.weight))
    choice = scores + gate.readable_bias
    if gate.n_group > 1:
        choice = _keep_best_groups(gate, choice)
    chosen = best(choice, gate.top_k)
    weights = paddle.where(chosen, scores, paddle.zeros_like(scores))
    if gate.norm_topk_prob:
        weights = weights / (weights.sum(axis=1, keepdim=True) + 1e-20)
    return weights * float(gate.scaling), chosen


def best(scores: Any, k: int) -> Any:
    """bool like `scores` [rows, n]: the k largest of each row, ties to the lower column."""
    order = paddle.argsort(scores, axis=1, descending=True, stable=True)
    # the rank of a column is its place in that order
    return paddle.argsort(order, axis=1) < k


def _keep_best_groups(gate: Any, choice: Any) -> Any:
    """`choice` with the experts of all but the best `topk_group` groups at -inf."""
    num_tokens, num_experts = choice.shape
    grouped = choice.reshape([num_tokens, gate.n_group, -1])
    pair = paddle.sort(grouped, axis=2, descending=True)[:, :, :2].sum(axis=2)
    kept = best(pair, gate.topk_group).unsqueeze(2)
    lowest = paddle.full_like(grouped, float("-inf"))
    return paddle.where(kept, grouped, lowest).reshape([num_tokens, num_experts])
