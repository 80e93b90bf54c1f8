"""Gate, mixture and MLP against loops over tokens, groups and experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.models.config import ModelConfig
from fd_dsa.models.moe import DeepseekMLP, DeepseekMoE, NoAuxTopkGate
from tests.models.folders import TINY
from tests.reference.moe import GateRule, ref_gate, ref_mlp


def config_of(rule: GateRule, num_experts: int, **more: Any) -> ModelConfig:
    return ModelConfig.from_dict(
        TINY
        | {
            "n_routed_experts": num_experts,
            "num_experts_per_tok": rule.top_k,
            "n_group": rule.n_group,
            "topk_group": rule.topk_group,
            "norm_topk_prob": rule.norm_topk_prob,
            "routed_scaling_factor": rule.scaling,
            **more,
        }
    )


def check_gate(logits: np.ndarray, bias: np.ndarray, rule: GateRule) -> list[list[int]]:
    """Run the gate on rows that give these logits exactly; returns the chosen experts."""
    tokens, num_experts = logits.shape
    gate = NoAuxTopkGate(config_of(rule, num_experts, hidden_size=max(tokens, 4)))
    weight = np.zeros(gate.weight.shape, np.float32)
    weight[:tokens] = logits
    gate.weight.set_value(weight)
    gate.e_score_correction_bias.set_value(bias)
    experts, weights = gate(np.eye(len(weight), dtype=np.float32)[:tokens])
    assert (experts.dtype, weights.dtype) == (np.int32, np.float32)
    scores = np.float32(1) / (np.float32(1) + np.exp(-logits))
    for t in range(tokens):
        wanted = ref_gate(scores[t], bias, rule)
        assert experts[t].tolist() == list(wanted), t
        np.testing.assert_allclose(weights[t], list(wanted.values()), rtol=1e-5)
    return experts.tolist()


RULES = [
    GateRule(3),
    GateRule(3, norm_topk_prob=False, scaling=2.5),
    GateRule(12, scaling=0.5),
    GateRule(4, n_group=4, topk_group=2),
    GateRule(3, n_group=4, topk_group=1, norm_topk_prob=False),
    GateRule(5, n_group=3, topk_group=2, scaling=2.5),
    GateRule(12, n_group=2, topk_group=2),
]


@given(rule=st.sampled_from(RULES), seed=st.integers(0, 2**32 - 1), coarse=st.booleans())
@settings(max_examples=150)
def test_gate_of_random_tokens(rule: GateRule, seed: int, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    if coarse:
        # few values, so that experts and groups tie; corrected scores of both signs
        logits = rng.integers(-2, 3, (4, 12)).astype(np.float32)
        bias = (rng.integers(-4, 3, 12) / 2).astype(np.float32)
    else:
        logits = (3 * rng.standard_normal((4, 12))).astype(np.float32)
        bias = rng.standard_normal(12).astype(np.float32)
    check_gate(logits, bias, rule)


def test_scores_are_sigmoids() -> None:
    logits = np.array([[-100.0, -9.0, 0.0, 9.0]], np.float32)
    gate = NoAuxTopkGate(config_of(GateRule(4, norm_topk_prob=False), 4, hidden_size=4))
    weight = np.zeros((4, 4), np.float32)
    weight[0] = logits
    gate.weight.set_value(weight)
    _, weights = gate(np.eye(4, dtype=np.float32)[:1])
    np.testing.assert_allclose(
        weights, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=1e-5, atol=1e-37
    )


# logits (all zero where a number), bias, rule, chosen experts
CHOICES = {
    "ties go to the lower expert": (8, [0] * 8, GateRule(3), [0, 1, 2]),
    "the bias decides": (8, [0] * 5 + [0.5, 0, 0], GateRule(3), [0, 1, 5]),
    # groups 1 and 3 equal, 0 and 2 below
    "ties of groups": (8, [0, 0, 0.5, 0, 0, 0, 0, 0.5], GateRule(2, 4, 1), [2, 3]),
    # the kept experts score -1.5; a dropped group masked with 0 would win over them
    "dropped groups": (8, [-5] * 4 + [-2] * 4, GateRule(3, 2, 1), [4, 5, 6]),
    "the bias does not weigh": ([3, 0, -3, -3], [0, 0, 0, 9], GateRule(1, 1, 1, False), [3]),
    # group 0 has the best expert, group 1 the better pair
    "best two of a group": (8, [1, -1, -1, -1, 0.25, 0.25, -9, -9], GateRule(2, 2, 1), [4, 5]),
}


@pytest.mark.parametrize(("logits", "bias", "rule", "experts"), CHOICES.values(), ids=CHOICES)
def test_choices_by_hand(logits: Any, bias: list[float], rule: GateRule, experts: Any) -> None:
    row = [0.0] * logits if isinstance(logits, int) else logits
    assert check_gate(np.float32([row]), np.float32(bias), rule) == [experts]


def random_tensors(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Checkpoint tensors of one mixture, by name below its prefix."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    sizes = {f"experts.{i}.": width for i in range(config.n_routed_experts)}
    sizes["shared_experts."] = width * config.n_shared_experts
    tensors = {
        "gate.weight": rng.standard_normal((config.n_routed_experts, hidden)) / 6,
        "gate.e_score_correction_bias": 0.2 * rng.standard_normal(config.n_routed_experts),
    }
    for name, inner in sizes.items():
        tensors[f"{name}gate_proj.weight"] = rng.standard_normal((inner, hidden)) / 4
        tensors[f"{name}up_proj.weight"] = rng.standard_normal((inner, hidden)) / 4
        tensors[f"{name}down_proj.weight"] = rng.standard_normal((hidden, inner)) / 4
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def load(layer: Any, tensors: dict[str, np.ndarray]) -> None:
    """Fill a layer through its own loaders, each tensor once."""
    loaders = layer.weight_loaders("")
    assert loaders.keys() == tensors.keys()
    for name, array in tensors.items():
        loaders[name](array)


def ref_mlp_of(tensors: dict[str, np.ndarray], prefix: str, x: np.ndarray) -> np.ndarray:
    names = ("gate_proj", "up_proj", "down_proj")
    return ref_mlp(x, *(tensors[f"{prefix}{n}.weight"].astype(np.float64) for n in names))


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_mixture(rule: GateRule, num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    config = config_of(rule, 12)
    layer, tensors = DeepseekMoE(config), random_tensors(config, rng)
    load(layer, tensors)
    x = rng.standard_normal((num_tokens, config.hidden_size)).astype(np.float32)
    before = x.copy()
    found = layer(x)
    np.testing.assert_array_equal(x, before)
    for t in range(num_tokens):
        logits = tensors["gate.weight"].astype(np.float64) @ x[t]
        scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
        wanted = ref_mlp_of(tensors, "shared_experts.", x[t])
        chosen = ref_gate(scores, tensors["gate.e_score_correction_bias"], rule)
        for expert, weight in chosen.items():
            wanted = wanted + weight * ref_mlp_of(tensors, f"experts.{expert}.", x[t])
        np.testing.assert_allclose(found[t], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_tokens_do_not_meet() -> None:
    """A token of NaN or of huge values changes no other token."""
    rng = np.random.default_rng(0)
    config = config_of(GateRule(4, n_group=4, topk_group=2), 12)
    layer = DeepseekMoE(config)
    load(layer, random_tensors(config, rng))
    x = rng.standard_normal((5, config.hidden_size)).astype(np.float32)
    clean = layer(x)
    x[2] = np.nan
    found = layer(x)
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(found[others], clean[others], rtol=0, atol=1e-5)
    assert np.isnan(found[2]).all()


def test_mlp_of_extreme_values() -> None:
    layer = DeepseekMLP(2, 2)
    layer.gate_up_proj.set_value(np.array([[1, 0, 1, 0], [0, 1, 0, 1]], np.float32))
    layer.down_proj.set_value(np.eye(2, dtype=np.float32))
    found = layer(np.array([[-200.0, 200.0], [0.0, -1.0]], np.float32))
    # silu(x) * x: 0 far below, x^2 far above
    wanted = [[0.0, 40000.0], [0.0, 1 / (1 + np.e)]]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-30)
