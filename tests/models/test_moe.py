"""Gate, mixture and MLP against loops over tokens, groups and experts, on host and device."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("paddle", reason="the layers are on Paddle's tensors")

from fd_dsa.models import moe
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.moe import DeepseekMLP, DeepseekMoE, NoAuxTopkGate
from fd_dsa.models.registry import config_from_dict
from fd_dsa.models.weights import HostWeights
from fd_dsa.ops.expert_kernels import choose_experts
from fd_dsa.tensor import Normed
from tests.conftest import PADDLE_MEMORIES
from tests.kernel_memory import KernelMemory, open_memory
from tests.models.folders import TINY
from tests.reference.moe import GateRule, ref_gate, ref_mlp
from tests.runner.tiny import stored


def config_of(rule: GateRule, num_experts: int, **more: Any) -> ModelConfig:
    return config_from_dict(
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
            slot_mapping=memory.put(np.zeros(len(logits), np.int64)),
        )
        found = tuple(map(memory.get, found[:2]))
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
    hidden = max(tokens, 4)
    gate = NoAuxTopkGate(config_of(rule, num_experts, hidden_size=hidden), HostWeights(), "")
    gate.weight.array[...] = 0
    gate.weight.array[:tokens] = logits
    gate.bias[...] = bias
    experts, weights = gate.forward(np.eye(hidden, dtype=np.float32)[:tokens])
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


def ref_mlp_of(tensors: dict[str, np.ndarray], prefix: str, x: np.ndarray) -> np.ndarray:
    names = ("gate_proj", "up_proj", "down_proj")
    return ref_mlp(x, *(tensors[f"{prefix}{n}.weight"].astype(np.float64) for n in names))


def mixture(place: str, rule: GateRule, seed: int = 0) -> tuple[Any, dict[str, np.ndarray]]:
    """A mixture of twelve experts in a place, which takes and gives arrays, and its tensors."""
    config = config_of(rule, 12)
    tensors = random_tensors(config, np.random.default_rng(seed))
    memory = None if place == "host" else open_memory(place)
    weights: Any = HostWeights() if memory is None else weights_in(memory)
    layer = DeepseekMoE(config, weights, "")
    assert weights.loaders.keys() == tensors.keys()
    for name, array in tensors.items():
        weights.loaders[name](stored(name, array))
    weights.finish()

    def run(
        x: np.ndarray, padded: tuple[int, ...] = (), form: Callable[[Any], Any] = lambda x: x
    ) -> np.ndarray:
        if memory is None:
            return layer.forward(x)
        slots = np.arange(len(x), dtype=np.int64)
        slots[list(padded)] = -1
        meta = SimpleNamespace(slot_mapping=memory.put(slots))
        return memory.get(layer.forward(form(memory.put(x)), meta))

    run.loaders = weights.loaders  # type: ignore[attr-defined]
    return run, tensors


def weights_in(memory: KernelMemory, **formats: Any) -> Any:
    """DeviceWeights in a memory."""
    from fd_dsa.models.device_weights import DeviceWeights

    return DeviceWeights("float32", lambda shape, dtype: memory.poisoned(shape, dtype), **formats)


def tokens(count: int) -> np.ndarray:
    """Random hidden states."""
    shape = (count, TINY["hidden_size"])
    return np.random.default_rng([count, 1]).standard_normal(shape).astype(np.float32)


# shares that are normed or not, scaled, of all experts, of groups; the gate has tests of its own
@pytest.mark.parametrize(
    ("rule", "num_tokens"),
    [(RULES[0], 1), (RULES[1], 2), (RULES[2], 9), (RULES[5], 9)],
    ids=repr,
)
@pytest.mark.parametrize("place", PLACES)
def test_mixture(place: str, rule: GateRule, num_tokens: int) -> None:
    run, tensors = mixture(place, rule, num_tokens)
    x = tokens(num_tokens)
    before = x.copy()
    found = run(x)
    np.testing.assert_array_equal(x, before)
    for t in range(num_tokens):
        logits = tensors["gate.weight"].astype(np.float64) @ x[t]
        scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
        wanted = ref_mlp_of(tensors, "shared_experts.", x[t])
        chosen = ref_gate(scores, tensors["gate.e_score_correction_bias"], rule)
        for expert, weight in chosen.items():
            wanted = wanted + weight * ref_mlp_of(tensors, f"experts.{expert}.", x[t])
        np.testing.assert_allclose(found[t], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.filterwarnings("ignore:invalid value encountered in (dot|matmul):RuntimeWarning")
@pytest.mark.parametrize("place", PLACES)
def test_tokens_do_not_meet(place: str) -> None:
    """A token of NaN changes no other token, nor does an expert that overflows on others."""
    run, tensors = mixture(place, RULES[3])
    x = tokens(5)
    clean = run(x)
    scores = 1 / (1 + np.exp(-x[:2] @ tensors["gate.weight"].T))
    bias = tensors["gate.e_score_correction_bias"]
    used = {expert for row in scores for expert in ref_gate(row, bias, RULES[3])}
    x[2] = np.nan
    others = [0, 1, 3, 4]
    found = run(x)
    np.testing.assert_allclose(found[others], clean[others], rtol=0, atol=1e-5)
    assert np.isnan(found[2]).all()
    name = f"experts.{min(set(range(12)) - used)}.down_proj.weight"
    run.loaders[name](stored(name, np.full_like(tensors[name], np.inf)))
    np.testing.assert_allclose(run(x)[:2], clean[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", PADDLE_MEMORIES)
def test_padded_tokens_take_no_expert(place: str) -> None:
    run, tensors = mixture(place, RULES[3])
    x = tokens(5)
    whole, found = run(x), run(x, padded=(1, 4))
    np.testing.assert_array_equal(found[[0, 2, 3]], whole[[0, 2, 3]])
    wanted = [ref_mlp_of(tensors, "shared_experts.", x[t]) for t in (1, 4)]
    np.testing.assert_allclose(found[[1, 4]], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("place", PADDLE_MEMORIES)
def test_chunks_of_tokens(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = mixture(place, RULES[3])
    x = tokens(11)
    whole = run(x)
    widest = max(TINY["moe_intermediate_size"], x.shape[1])
    for rows in (1, 3, 10):
        monkeypatch.setattr(moe, "EXPERT_BYTES", 4 * RULES[3].top_k * widest * rows)
        np.testing.assert_allclose(run(x), whole, rtol=0, atol=1e-6)
        # the form of a norm before FP8 weights
        normed = run(x, form=lambda values: Normed(values, None))
        np.testing.assert_allclose(normed, whole, rtol=0, atol=1e-6)


def test_mlp_of_extreme_values() -> None:
    weights = HostWeights()
    layer, one = DeepseekMLP(weights, "", 2, 2), np.eye(2, dtype=np.float32)
    for name, load in weights.loaders.items():
        load(stored(name, one))
    found = layer.forward(np.array([[-200.0, 200.0], [0.0, -1.0]], np.float32))
    # silu(x) * x: 0 far below, x^2 far above
    wanted = [[0.0, 40000.0], [0.0, 1 / (1 + np.e)]]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-30)
