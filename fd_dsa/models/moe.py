"""MLPs: dense, shared expert and routed experts with the noaux_tc gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from fd_dsa.models.config import ModelConfig
from fd_dsa.models.weights_protocol import Weights
from fd_dsa.ops.arrays import values_of
from fd_dsa.ops.host_gemm import HostMatrix, matmul_spans
from fd_dsa.tensor import Array, Normed, Tensor

if TYPE_CHECKING:
    from fd_dsa.ops.expert_pairs import Choice

EXPERT_BYTES = 1 << 30
"""Max bytes of one activation of the selected experts. A longer step is split."""
Activations: TypeAlias = Union[np.ndarray, Tensor, Normed]  # noqa: UP007, as in fd_dsa.tensor
"""Input of an MLP: on a device also in the form of a norm that quantises."""
_Span: TypeAlias = tuple[tuple[HostMatrix, HostMatrix], int, int]
"""Weights of an expert, its first row and the end of its rows."""
_ONE = np.float32(1.0)
# max values of gate and up of experts that run together, so that they stay in a core's cache
_GROUP_VALUES = 1 << 17


def gated(weights: Weights, prefix: str, hidden_size: int, width: int) -> tuple[Any, Any]:
    """Return the weights of a gated MLP: gate and up in one GEMM, then down."""
    gate_up = {f"{prefix}gate_proj.weight": width, f"{prefix}up_proj.weight": width}
    down = {f"{prefix}down_proj.weight": hidden_size}
    return weights.matrix(hidden_size, gate_up), weights.matrix(width, down)


class DeepseekMLP:
    """Gated MLP, down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Weights, prefix: str, hidden_size: int, width: int) -> None:
        self.gate_up_proj, self.down_proj = gated(weights, prefix, hidden_size, width)

    def forward(self, x: Activations, forward_meta: Any = None) -> Any:
        """Return the output [num_tokens, hidden_size] of an input of the same shape."""
        return self.down_proj.matmul(self.down_proj.activated(self.gate_up_proj.matmul(x)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) in a new array."""
    out = np.negative(x)
    np.exp(out, out=out)
    out += _ONE
    return np.divide(_ONE, out, out=out)


class NoAuxTopkGate:
    """Router: selects experts by sigmoid score plus bias, weighs them by score.

    With expert groups, the score of a group is the sum of its two best experts, and only the best
    `topk_group` groups take part. Of equal scores the lower expert id is selected.

    Source: DeepSeek-V3 (arXiv 2412.19437) §2.1.2; Hugging Face transformers 5.23
    (DeepseekV32TopkRouter).
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        self.top_k, self.num_experts = config.num_experts_per_tok, config.n_routed_experts
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.scaling = np.float32(config.routed_scaling_factor)
        self.weight = weights.matrix(
            config.hidden_size, {f"{prefix}weight": self.num_experts}, sums_in_float32=True
        )
        self.bias = weights.vector({f"{prefix}e_score_correction_bias": self.num_experts})

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Select the experts of each token.

        Returns:
            Experts int32 [num_tokens, top_k], ascending, and their weights, float32, same shape.
        """
        logits = self.weight.matmul(x)
        with np.errstate(over="ignore"):
            scores = sigmoid(logits)
        choice = scores + self.bias
        if self.n_group > 1:
            choice = self._keep_best_groups(choice)
        experts = self.best(choice, self.top_k)
        weights = np.take_along_axis(scores, experts, axis=1)
        if self.norm_topk_prob:
            weights /= weights.sum(axis=1, keepdims=True) + np.float32(1e-20)
        return experts, weights * self.scaling

    def _keep_best_groups(self, choice: np.ndarray) -> np.ndarray:
        """Return `choice` with -inf for experts outside the best `topk_group` groups."""
        grouped = choice.reshape(len(choice), self.n_group, -1)
        pair = np.partition(grouped, grouped.shape[2] - 2, axis=2)[:, :, -2:]
        kept = np.zeros((len(choice), self.n_group), bool)
        groups = self.best(np.ascontiguousarray(pair.sum(axis=2)), self.topk_group)
        np.put_along_axis(kept, groups, True, axis=1)
        return np.where(kept[:, :, None], grouped, np.float32(-np.inf)).reshape(choice.shape)

    @staticmethod
    def best(scores: np.ndarray, k: int) -> np.ndarray:
        """Return the columns of the k largest scores of each row, int32, ascending.

        Of equal scores the lower column is selected.
        """
        best = np.negative(scores).argsort(axis=1, kind="stable")[:, :k].astype(np.int32)
        best.sort(axis=1)
        return best


class DeepseekMoE:
    """Routed experts plus the shared expert, accumulated in float32."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        width, hidden, count = (
            config.moe_intermediate_size,
            config.hidden_size,
            config.n_routed_experts,
        )
        self.intermediate_size, self.num_experts = width, count
        self.gate = NoAuxTopkGate(config, weights, f"{prefix}gate.")
        shared_width = width * config.n_shared_experts
        self.shared_experts = DeepseekMLP(weights, f"{prefix}shared_experts.", hidden, shared_width)
        # on a device one stack of all experts
        self.experts = weights.experts(f"{prefix}experts.", count, hidden, width)

    def forward(self, x: Activations, forward_meta: Any = None) -> Array:
        """Return the output [num_tokens, hidden_size] of an input of the same shape.

        On a device padded tokens have no routed experts.
        """
        if isinstance(x, np.ndarray):
            out = self.shared_experts.forward(x)
            out += routed(x, *self.gate.forward(x), self.experts, HostMatrix.activated)
            return out
        return self._forward_on_device(x, forward_meta.slot_mapping)

    def _forward_on_device(self, x: Tensor | Normed, slot_mapping: Tensor) -> Tensor:
        """Return the output of `forward` on a device."""
        # kernels are loaded only if there is a device
        from fd_dsa.ops.expert_kernels import choose_experts

        gate, mlp = self.gate, self.shared_experts
        inner, logits = mlp.gate_up_proj.matmul_beside(x, gate.weight, mlp.down_proj)
        shared = mlp.down_proj.matmul(inner)
        choice = choose_experts(
            logits,
            gate.bias,
            top_k=gate.top_k,
            n_group=gate.n_group,
            topk_group=gate.topk_group,
            norm=gate.norm_topk_prob,
            scaling=float(gate.scaling),
            slot_mapping=slot_mapping,
        )
        return routed_on_device(x, shared, choice, self.experts)


def routed_on_device(
    x: Tensor | Normed,
    shared: Tensor,
    choice: Choice,
    experts: tuple[Any, Any],
    limit: float | None = None,
) -> Tensor:
    """Return `shared` plus the weighted sum of the chosen experts, on a device.

    The host does not know which experts have tokens, because reading it back would cost a wait in
    every layer. So kernels list the tokens of each expert, and grids fit any selection.

    Args:
        choice: experts of each token.
        experts: gate_up and down of all experts, DeviceMatrix or FourBitExperts.
        limit: clamp of gate and up, see `silu_and_mul`.
    """
    # kernels are loaded only if there is a device
    from fd_dsa.ops.expert_kernels import sum_experts
    from fd_dsa.ops.expert_pairs import Choice, group_pairs

    ids, weights, lists = choice
    (gate_up, down), (num_tokens, top_k) = experts, ids.shape
    num_experts, *_ = gate_up.shape
    widest = max(down.shape[1:])
    rows = max(1, EXPERT_BYTES // (shared.element_size() * top_k * widest))
    if num_tokens > rows:
        import paddle

        chunks = [slice(i, i + rows) for i in range(0, num_tokens, rows)]
        # FP8 weights quantise a chunk again, because a Normed has no rows to slice
        plain = values_of(x)
        return paddle.concat(
            [
                routed_on_device(plain[c], shared[c], Choice(ids[c], weights[c]), experts, limit)
                for c in chunks
            ]
        )
    pairs, counts = lists or group_pairs(ids, num_experts)
    hidden = gate_up.grouped_matmul(x, pairs, counts, top_k=top_k, gated=True, limit=limit)
    parts = down.grouped_matmul(hidden, pairs, counts, top_k=top_k)
    return sum_experts(parts, weights, ids, shared)


def routed(
    x: np.ndarray,
    selected: np.ndarray,
    weights: np.ndarray,
    experts: Sequence[tuple[HostMatrix, HostMatrix]],
    activated: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return the weighted sum of each token's experts, [num_tokens, hidden_size].

    Only the GEMMs run expert by expert. Experts without a token are skipped.

    Args:
        x: float32 [num_tokens, hidden_size].
        selected: int32 [num_tokens, top_k], experts of each token. An expert may be named twice.
        weights: float32 [num_tokens, top_k], weights of the experts.
        experts: gate_up and down of each expert, HostMatrix.
        activated: activation of the results of gate_up, which it may change in place.
    """
    num_tokens, top_k = selected.shape
    widest = max(x.shape[1], experts[0][0].out_width)
    max_tokens = max(1, EXPERT_BYTES // (x.itemsize * top_k * widest))
    if num_tokens > max_tokens:
        chunks = [slice(i, i + max_tokens) for i in range(0, num_tokens, max_tokens)]
        return np.concatenate(
            [routed(x[c], selected[c], weights[c], experts, activated) for c in chunks]
        )
    flat = selected.ravel()
    order = flat.argsort(kind="stable")
    ends = np.bincount(flat).cumsum().tolist()
    spans = [span for span in zip(experts, [0, *ends], ends, strict=False) if span[2] > span[1]]
    tokens, factors = order // top_k, weights.take(order)[:, None]
    parts, out_width = np.empty((len(order), x.shape[1]), np.float32), experts[0][0].out_width
    for group in _groups(spans, _GROUP_VALUES // out_width):
        first, last = group[0][1], group[-1][2]
        rows = x.take(tokens[first:last], axis=0)
        gate_up = np.empty((len(rows), out_width), np.float32)
        places = [(*expert, start - first, end - first) for expert, start, end in group]
        matmul_spans(rows, gate_up, [(gate, start, end) for gate, _, start, end in places])
        inner = activated(gate_up)
        inner *= factors[first:last]
        matmul_spans(inner, rows, [(down, start, end) for _, down, start, end in places])
        parts[order[first:last]] = rows
    total: np.ndarray = np.add.reduce(parts.reshape(num_tokens, top_k, -1), axis=1)
    return total


def _groups(spans: Sequence[_Span], max_rows: int) -> Iterator[list[_Span]]:
    """Yield groups of neighbouring experts with at most `max_rows` rows, or one expert.

    Args:
        spans: each expert with its first row and the end of its rows.
    """
    group: list[_Span] = []
    for span in spans:
        if group and span[2] - group[0][1] > max_rows:
            yield group
            group = []
        group.append(span)
    if group:
        yield group
