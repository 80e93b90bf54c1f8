"""Experts as on a device, run on CPU tensors, against the host's."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.models import device_moe
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.moe import DeepseekMoE
from fd_dsa.ops._host import as_numpy
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
def test_the_sum_of_the_host(fields: dict[str, Any], num_tokens: int) -> None:
    layer, x = make_layer(**fields), tokens(num_tokens)
    experts, weights = layer.gate(x)
    found, chosen = device_moe.expert_weights(layer.gate, paddle.to_tensor(x))
    wanted = np.zeros((num_tokens, EXPERTS), np.float32)
    np.put_along_axis(wanted, experts, weights, axis=1)
    np.testing.assert_array_equal(chosen.numpy(), wanted != 0)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-7)
    routed = layer(x) - layer.shared_experts(x)
    np.testing.assert_allclose(
        device_moe.routed(layer, paddle.to_tensor(x)).numpy(), routed, rtol=0, atol=1e-5
    )


def test_ties_go_to_the_lower_expert() -> None:
    scores = np.float32([[1, 2, 2, 2, 0], [0, 0, 0, 0, 0], [-1, -2, 3, -1, -1]])
    chosen = device_moe.best(paddle.to_tensor(scores), 2).numpy()
    assert [np.flatnonzero(row).tolist() for row in chosen] == [[1, 2], [0, 1], [0, 2]]


def test_an_expert_that_overflows_on_others_tokens_spoils_nothing() -> None:
    layer, x = make_layer(), tokens(6)
    experts, _ = layer.gate(x)
    unused = int(np.setdiff1d(np.arange(EXPERTS), experts[:2])[0])
    as_numpy(layer.experts_down_proj.detach())[unused] = np.inf
    found = device_moe.routed(layer, paddle.to_tensor(x)).numpy()
    assert np.isfinite(found[:2]).all()


def test_chunks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(), paddle.to_tensor(tokens(11))
    wanted = device_moe.routed(layer, x).numpy()
    widest = max(2 * layer.intermediate_size, HIDDEN)
    for rows in (1, 3, 10):
        monkeypatch.setattr(device_moe, "EXPERT_BYTES", 4 * EXPERTS * widest * rows)
        found = device_moe.routed(layer, x).numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
