"""Gate, mixture and MLP against loops over tokens, groups and experts, on host and device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("paddle", reason="the layers are on Paddle's tensors")

from fd_dsa.models import moe
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.moe import DeepseekMLP, DeepseekMoE, NoAuxTopkGate, routed_on_device
from fd_dsa.ops._expert_kernels import choose_experts
from fd_dsa.ops._host import as_numpy
from tests.conftest import PADDLE_MEMORIES
from tests.kernel_memory import KernelMemory, open_memory
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


def check_gate(
    memory: KernelMemory | None, logits: np.ndarray, bias: np.ndarray, rule: GateRule
) -> list[list[int]]:
    """Choose experts by these logits, on the host or by the kernel in a memory; returns them."""
    if memory is None:
        found = of_the_host(logits, bias, rule)
    else:
        found = choose_experts(
            memory.put(logits),
            memory.put(bias),
            top_k=rule.top_k,
            n_group=rule.n_group,
            topk_group=rule.topk_group,
            norm=rule.norm_topk_prob,
            scaling=rule.scaling,
        )
        found = tuple(map(memory.get, found))
    with np.errstate(over="ignore"):
        scores = np.float32(1) / (np.float32(1) + np.exp(-logits))
    for row, experts, weights in zip(scores, *found, strict=True):
        wanted = ref_gate(row, bias, rule)
        assert experts.tolist() == list(wanted)
        np.testing.assert_allclose(weights, list(wanted.values()), rtol=1e-5, atol=1e-37)
    return [experts.tolist() for experts in found[0]]


def of_the_host(
    logits: np.ndarray, bias: np.ndarray, rule: GateRule
) -> tuple[np.ndarray, np.ndarray]:
    """The gate's experts and weights for rows that give these logits exactly."""
    tokens, num_experts = logits.shape
    gate = NoAuxTopkGate(config_of(rule, num_experts, hidden_size=max(tokens, 4)))
    weight = np.zeros(gate.weight.shape, np.float32)
    weight[:tokens] = logits
    gate.weight.set_value(weight)
    gate.e_score_correction_bias.set_value(bias)
    experts, weights = gate(np.eye(len(weight), dtype=np.float32)[:tokens])
    assert (experts.dtype, weights.dtype) == (np.int32, np.float32)
    return experts, weights


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
    check_gate(None, logits, bias, rule)


PLACES = ["host", *PADDLE_MEMORIES]
EQUAL, TIES = [[0] * 8], [[1, 2, 2, 2, 0], [0] * 5, [-1, -2, 3, -1, -1]]
# logits, correction bias, rule, chosen experts
DECIDED: dict[str, tuple[Any, Any, GateRule, list[list[int]]]] = {
    "sigmoids": ([[-100, -9, 0, 9]], [0] * 4, GateRule(4, 1, 1, False), [[0, 1, 2, 3]]),
    "ties": (TIES, [0] * 5, GateRule(2, 1, 1, False, 2.0), [[1, 2], [0, 1], [0, 2]]),
    "a tie after the bias": (EQUAL, [0] * 5 + [0.5, 0, 0], GateRule(3), [[0, 1, 5]]),
    # groups 1 and 3 equal, 0 and 2 below
    "ties of groups": (EQUAL, [0, 0, 0.5, 0, 0, 0, 0, 0.5], GateRule(2, 4, 1), [[2, 3]]),
    # three groups of three: two best of 2 + 1, of 1 + 2 and of 3 + 0
    "no powers of two": (
        [[2, 1, -9, -9, 1, 2, 3, 0, -9]],
        [0] * 6 + [-0.1, -0.1, 0],
        GateRule(2, 3, 1),
        [[0, 1]],
    ),
    # the kept experts score -1.5; a dropped group masked with 0 would win over them
    "dropped groups": (EQUAL, [-5] * 4 + [-2] * 4, GateRule(3, 2, 1), [[4, 5, 6]]),
    "no weight of the bias": ([[3, 0, -3, -3]], [0, 0, 0, 9], GateRule(1, 1, 1, False), [[3]]),
    # group 0 has the best expert, group 1 the better pair
    "best two": (EQUAL, [1, -1, -1, -1, 0.25, 0.25, -9, -9], GateRule(2, 2, 1), [[4, 5]]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("logits", "bias", "rule", "experts"), DECIDED.values(), ids=DECIDED)
def test_gate_of_decided_tokens(
    place: str, logits: Any, bias: Any, rule: GateRule, experts: list[list[int]]
) -> None:
    memory = None if place == "host" else open_memory(place)
    assert check_gate(memory, np.float32(logits), np.float32(bias), rule) == experts


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


def mixture(rule: GateRule, seed: int = 0) -> tuple[DeepseekMoE, dict[str, np.ndarray]]:
    """A mixture of twelve experts and its tensors."""
    config = config_of(rule, 12)
    layer, tensors = DeepseekMoE(config), random_tensors(config, np.random.default_rng(seed))
    load(layer, tensors)
    return layer, tensors


def tokens(count: int) -> np.ndarray:
    """Random hidden states."""
    shape = (count, TINY["hidden_size"])
    return np.random.default_rng([count, 1]).standard_normal(shape).astype(np.float32)


def routed(layer: DeepseekMoE, x: np.ndarray, m: KernelMemory) -> np.ndarray:
    """The routed experts as on a device, whose layers hold these tensors."""

    def put(parameter: Any) -> Any:
        return m.put(as_numpy(parameter.detach()))

    gate = layer.gate
    names = ("top_k", "n_group", "topk_group", "norm_topk_prob", "scaling")
    own = SimpleNamespace(
        weight=put(gate.weight),
        readable_bias=put(gate.e_score_correction_bias),
        **{name: getattr(gate, name) for name in names},
    )
    on_device = SimpleNamespace(
        gate=own,
        readable_experts=(put(layer.experts_gate_up_proj), put(layer.experts_down_proj)),
        num_experts=layer.num_experts,
        intermediate_size=layer.intermediate_size,
    )
    return m.get(routed_on_device(on_device, m.put(x)))


def run(place: str, layer: DeepseekMoE, x: np.ndarray) -> np.ndarray:
    """Output of a mixture in a place."""
    if place == "host":
        return layer(x)
    return layer.shared_experts(x) + routed(layer, x, open_memory(place))


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_mixture(place: str, rule: GateRule, num_tokens: int) -> None:
    layer, tensors = mixture(rule, num_tokens)
    x = tokens(num_tokens)
    before = x.copy()
    found = run(place, layer, x)
    np.testing.assert_array_equal(x, before)
    for t in range(num_tokens):
        logits = tensors["gate.weight"].astype(np.float64) @ x[t]
        scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
        wanted = ref_mlp_of(tensors, "shared_experts.", x[t])
        chosen = ref_gate(scores, tensors["gate.e_score_correction_bias"], rule)
        for expert, weight in chosen.items():
            wanted = wanted + weight * ref_mlp_of(tensors, f"experts.{expert}.", x[t])
        np.testing.assert_allclose(found[t], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("place", PLACES)
def test_tokens_do_not_meet(place: str) -> None:
    """A token of NaN changes no other token, nor does an expert that overflows on others."""
    layer, _ = mixture(RULES[3])
    x = tokens(5)
    clean = run(place, layer, x)
    experts, _ = layer.gate(x)
    x[2] = np.nan
    others = [0, 1, 3, 4]
    found = run(place, layer, x)
    np.testing.assert_allclose(found[others], clean[others], rtol=0, atol=1e-5)
    assert np.isnan(found[2]).all()
    unused = int(np.setdiff1d(np.arange(12), experts[:2])[0])
    as_numpy(layer.experts_down_proj.detach())[unused] = np.inf
    np.testing.assert_allclose(run(place, layer, x)[:2], clean[:2], rtol=0, atol=1e-5)


def test_chunks_of_tokens(paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = mixture(RULES[3])
    x = tokens(11)
    whole = routed(layer, x, paddle_memory)
    widest = max(layer.intermediate_size, x.shape[1])
    for rows in (1, 3, 10):
        monkeypatch.setattr(moe, "EXPERT_BYTES", 4 * layer.gate.top_k * widest * rows)
        found = routed(layer, x, paddle_memory)
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)


def test_mlp_of_extreme_values() -> None:
    layer = DeepseekMLP(2, 2)
    layer.gate_up_proj.set_value(np.array([[1, 0, 1, 0], [0, 1, 0, 1]], np.float32))
    layer.down_proj.set_value(np.eye(2, dtype=np.float32))
    found = layer(np.array([[-200.0, 200.0], [0.0, -1.0]], np.float32))
    # silu(x) * x: 0 far below, x^2 far above
    wanted = [[0.0, 40000.0], [0.0, 1 / (1 + np.e)]]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-30)
