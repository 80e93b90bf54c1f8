"""Oracle of the expert gate and the mixture: loops over tokens, groups and experts, in doubles.

Source: DeepSeek-V3 (arXiv 2412.19437) §2.1.2; a dropped group counts -inf, ties go to the lower id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class GateRule:
    """Rules of the gate's choice in addition to its weights."""

    top_k: int
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    scaling: float = 1.0


def ref_best(scores: dict[int, float], k: int) -> list[int]:
    """The k keys with the largest scores, the lower key first among equals, ascending."""
    return sorted(sorted(scores, key=lambda i: (-scores[i], i))[:k])


def ref_gate(scores: Any, bias: Any, rule: GateRule) -> dict[int, float]:
    """Chosen experts of one token and their weights.

    Args:
        scores: float32 [num_experts]; sigmoid of the router's logits.
        bias: float32 [num_experts]; correction added for the choice only.
    """
    # float32, as ties must be ties
    corrected = {i: float(np.float32(s) + np.float32(bias[i])) for i, s in enumerate(scores)}
    size = len(corrected) // rule.n_group
    if rule.n_group > 1:
        groups = {}
        for g in range(rule.n_group):
            members = sorted((corrected[i] for i in range(g * size, (g + 1) * size)), reverse=True)
            groups[g] = float(np.float32(members[0]) + np.float32(members[1]))
        kept = ref_best(groups, rule.topk_group)
        corrected = {i: s for i, s in corrected.items() if i // size in kept}
    weights = {i: float(scores[i]) for i in ref_best(corrected, rule.top_k)}
    if rule.norm_topk_prob:
        total = sum(weights.values()) + 1e-20
        weights = {i: w / total for i, w in weights.items()}
    return {i: w * rule.scaling for i, w in weights.items()}


def ref_mlp(x: Any, gate: Any, up: Any, down: Any) -> np.ndarray:
    """float64 [hidden]: down . (silu(gate . x) * (up . x)), matrices as in a checkpoint."""
    x = np.asarray(x, np.float64)
    hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gate @ x, up @ x, strict=True)]
    return down @ np.array(hidden)
