"""Experts as on a device against the host's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the layers are on Paddle's tensors")

from fd_dsa.models import device_moe
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.moe import DeepseekMoE
from fd_dsa.ops._expert_kernels import choose_experts, sum_experts
from fd_dsa.ops._host import as_numpy
from tests.kernel_memory import KernelMemory
from tests.models.folders import TINY

HIDDEN, EXPERTS = 32, 8


def make_layer(seed: int = 0, **fields: Any) -> DeepseekMoE:
    """A mixture with random weights; the correction bias decides often."""
    sizes = {"hidden_size": HIDDEN, "n_routed_experts": EXPERTS, "num_experts_per_tok": 3}
    layer = DeepseekMoE(ModelConfig.from_dict(TINY | sizes | fields))
    rng = np.random.default_rng(seed)
    for parameter in layer.parameters():
        memory = as_numpy(parameter.detach())
        memory[...] = rng.standard_normal(memory.shape) / np.sqrt(HIDDEN)
    return layer


def on_device(layer: DeepseekMoE, m: KernelMemory) -> Any:
    """The layer with its parameters as the tensors that they are on a device."""

    def put(parameter: Any) -> Any:
        return m.put(as_numpy(parameter.detach()))

    gate = layer.gate
    names = ("top_k", "n_group", "topk_group", "norm_topk_prob", "scaling")
    own = SimpleNamespace(
        weight=put(gate.weight),
        readable_bias=put(gate.e_score_correction_bias),
        **{name: getattr(gate, name) for name in names},
    )
    return SimpleNamespace(
        gate=own,
        experts_gate_up_proj=put(layer.experts_gate_up_proj),
        experts_down_proj=put(layer.experts_down_proj),
        num_experts=layer.num_experts,
        intermediate_size=layer.intermediate_size,
    )


def tokens(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, HIDDEN)).astype(np.float32)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_group": 1, "topk_group": 1},
        {"n_group": 4, "topk_group": 2},
        {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    ],
    ids=["plain", "groups", "unnormed"],
)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_the_sum_of_the_host(
    paddle_memory: KernelMemory, fields: dict[str, Any], num_tokens: int
) -> None:
    layer, x = make_layer(**fields), tokens(num_tokens)
    experts, weights = layer.gate(x)
    found, chosen = device_moe.expert_weights(
        on_device(layer, paddle_memory).gate, paddle_memory.put(x)
    )
    wanted = np.zeros((num_tokens, EXPERTS), np.float32)
    np.put_along_axis(wanted, experts, weights, axis=1)
    np.testing.assert_array_equal(chosen.numpy(), wanted != 0)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-7)
    routed = layer(x) - layer.shared_experts(x)
    np.testing.assert_allclose(
        device_moe.routed(on_device(layer, paddle_memory), paddle_memory.put(x)).numpy(),
        routed,
        rtol=0,
        atol=1e-5,
    )


RULES = {"top_k": 2, "n_group": 1, "topk_group": 1, "norm": False, "scaling": 2.0}


def test_ties_go_to_the_lower_expert(paddle_memory: KernelMemory) -> None:
    scores = np.float32([[1, 2, 2, 2, 0], [0, 0, 0, 0, 0], [-1, -2, 3, -1, -1]])
    zeros = paddle_memory.put(np.zeros(5, np.float32))
    weights, chosen = choose_experts(paddle_memory.put(scores), zeros, **RULES)
    found = [np.flatnonzero(row).tolist() for row in chosen.numpy()]
    assert found == [[1, 2], [0, 1], [0, 2]]
    wanted = np.where(chosen.numpy() != 0, 2 / (1 + np.exp(-scores)), 0)
    np.testing.assert_allclose(weights.numpy(), wanted, rtol=1e-6, atol=0)


def test_ties_of_groups_go_to_the_lower_group_and_counts_need_no_powers_of_two(
    paddle_memory: KernelMemory,
) -> None:
    rules = RULES | {"n_group": 3, "topk_group": 1, "top_k": 2}
    # groups of three: two best of 2 + 1, of 1 + 2 and of 3 + 0
    logits = np.float32([[2, 1, -9, -9, 1, 2, 3, 0, -9]])
    bias = np.float32([0, 0, 0, 0, 0, 0, -0.1, -0.1, 0])
    scores = 1 / (1 + np.exp(-logits[0].astype(np.float64))) + bias
    pairs = [sum(sorted(scores[i : i + 3])[-2:]) for i in (0, 3, 6)]
    assert pairs[0] == pairs[1] > pairs[2]
    _, chosen = choose_experts(paddle_memory.put(logits), paddle_memory.put(bias), **rules)
    assert np.flatnonzero(chosen.numpy()[0]).tolist() == [0, 1]


def test_the_bias_chooses_and_does_not_weigh(paddle_memory: KernelMemory) -> None:
    logits, bias = np.float32([[0.5, 1, -1]]), np.float32([0, 0, 5])
    rules = RULES | {"top_k": 1, "norm": True}
    weights, chosen = choose_experts(paddle_memory.put(logits), paddle_memory.put(bias), **rules)
    assert chosen.numpy().tolist() == [[0, 0, 1]]
    np.testing.assert_allclose(weights.numpy(), [[0, 0, 2]], rtol=1e-6)


def test_rows_that_are_no_numbers_spoil_no_others(paddle_memory: KernelMemory) -> None:
    logits = np.float32([[1, 2, 3], [np.nan] * 3, [3, 2, 1]])
    weights, chosen = choose_experts(
        paddle_memory.put(logits), paddle_memory.put(np.zeros(3, np.float32)), **RULES
    )
    parts = np.ones((3, 3, 4), np.float32)
    parts[:, 1] = np.nan
    found = sum_experts(paddle_memory.put(parts), weights, chosen).numpy()
    assert chosen.numpy()[[0, 2]].tolist() == [[0, 1, 1], [1, 1, 0]]
    wanted = weights.numpy()[[0, 2]].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found[[0, 2]], np.repeat(wanted, 4, axis=1), rtol=1e-6)


def test_an_expert_that_overflows_on_others_tokens_spoils_nothing(
    paddle_memory: KernelMemory,
) -> None:
    layer, x = make_layer(), tokens(6)
    experts, _ = layer.gate(x)
    unused = int(np.setdiff1d(np.arange(EXPERTS), experts[:2])[0])
    as_numpy(layer.experts_down_proj.detach())[unused] = np.inf
    found = device_moe.routed(on_device(layer, paddle_memory), paddle_memory.put(x)).numpy()
    assert np.isfinite(found[:2]).all()


def test_chunks_of_tokens(paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(), paddle_memory.put(tokens(11))
    wanted = device_moe.routed(on_device(layer, paddle_memory), x).numpy()
    widest = max(2 * layer.intermediate_size, HIDDEN)
    for rows in (1, 3, 10):
        monkeypatch.setattr(device_moe, "EXPERT_BYTES", 4 * EXPERTS * widest * rows)
        found = device_moe.routed(on_device(layer, paddle_memory), x).numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
