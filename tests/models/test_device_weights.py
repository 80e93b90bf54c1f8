"""Tensors of a checkpoint as a device holds them, in every memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the weights are Paddle's tensors")

from fd_dsa.device import transfers
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.sources import RandomTensor, StoredTensor
from tests.kernel_memory import KernelMemory
from tests.models.folders import bf16, f8, f16, f32
from tests.ops.block_fp8 import get, weight, weight_values
from tests.runner.tiny import stored_as

pytestmark = pytest.mark.triton
RNG = np.random.default_rng(0)


def weights_in(m: KernelMemory, dtype: str, *fp8: str) -> DeviceWeights:
    return DeviceWeights(dtype, m.poisoned, fp8)


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [f32, f16, bf16])
def test_plain_tensors(
    paddle_memory: KernelMemory, held: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of one weight, through buffers that are much smaller."""
    m, weights = paddle_memory, weights_in(paddle_memory, held)
    monkeypatch.setattr(transfers, "UPLOAD_BYTES", 1000)
    # what every type holds exactly
    values = RNG.integers(-8, 9, (50, 30)).astype(np.float32) / 4
    made = weights.matrix(30, {"a": 20, "b": 30})
    keys, others = weights.columns(30, {"c": 20, "d": 30}, {"d": 0.5})
    norm = weights.vector({"e": 30})
    parts = {"a": values[:20], "b": values[20:], "c": values[:20], "d": values[20:]}
    for name, part in (parts | {"e": values[0]}).items():
        weights.loaders[name](stored_as(name, kind(part)))
    weights.finish()
    np.testing.assert_array_equal(get(m, made.values), values)
    np.testing.assert_array_equal(get(m, keys), values[:20].T)
    np.testing.assert_array_equal(get(m, others), values[20:].T / 2)
    np.testing.assert_array_equal(get(m, norm), values[0])


def fp8_tensor(name: str, codes: np.ndarray, scales: np.ndarray) -> StoredTensor:
    scale = stored_as(f"{name}_scale_inv", f32(scales))
    return stored_as(name, f8(codes), scale)


def test_fp8_tensors_keep_their_bytes(paddle_memory: KernelMemory) -> None:
    m, names = paddle_memory, ["a", "b", "c", "d"]
    weights = weights_in(m, "bfloat16", *names)
    tensors = {
        name: weight(RNG, rows, 160) for name, rows in zip(names, (128, 40, 40, 128), strict=True)
    }
    joined = weights.matrix(160, {"a": 128, "b": 40})
    # the second part begins in the middle of a block: bfloat16
    mixed = weights.matrix(160, {"c": 40, "d": 128})
    for name, (codes, scales) in tensors.items():
        weights.loaders[name](fp8_tensor(name, codes, scales))
    weights.finish()
    both = [np.concatenate(pair) for pair in zip(tensors["a"], tensors["b"], strict=True)]
    np.testing.assert_array_equal(m.get(joined.values), both[0])
    np.testing.assert_array_equal(m.get(joined.scales), both[1])
    assert mixed.scales is None
    wanted = np.concatenate([weight_values(*tensors[name]) for name in "cd"])
    np.testing.assert_allclose(get(m, mixed.values), wanted, rtol=2**-8)


def test_experts_are_stacked(paddle_memory: KernelMemory) -> None:
    m = paddle_memory
    parts = {"gate": (128, 160), "up": (128, 160), "down": (160, 128)}
    names = [f"{i}.{part}_proj.weight" for i in range(2) for part in parts]
    weights = weights_in(m, "bfloat16", *names)
    stacks = weights.experts("", 2, 160, 128)
    tensors = {name: weight(RNG, *parts[name.split(".")[1][:-5]]) for name in names}
    for name, pair in tensors.items():
        weights.loaders[name](fp8_tensor(name, *pair))
    weights.finish()
    for i in range(2):
        gate, up, down = (tensors[f"{i}.{part}_proj.weight"] for part in parts)
        for field, place in (("values", 0), ("scales", 1)):
            gate_up = np.concatenate([gate[place], up[place]])
            np.testing.assert_array_equal(m.get(getattr(stacks[0], field))[i], gate_up)
            np.testing.assert_array_equal(m.get(getattr(stacks[1], field))[i], down[place])


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
def test_random_tensors(paddle_memory: KernelMemory, form: str) -> None:
    """The spread is that of the rows' length in every form; a seed names the numbers."""
    m, fp8 = paddle_memory, ("a", "b") if form == "fp8" else ()
    drawn = []
    for seed in (1, 1, 2):
        weights = weights_in(m, "float32" if form == "float32" else "bfloat16", *fp8)
        made = weights.matrix(160, {"a": 128, "b": 40})
        norm, bias = weights.vector({"n.weight": 8}), weights.vector({"n.bias": 8})
        for name, shape in {
            "a": (128, 160),
            "b": (40, 160),
            "n.weight": (8,),
            "n.bias": (8,),
        }.items():
            weights.loaders[name](RandomTensor(name, shape, seed))
        weights.finish()
        assert (m.get(norm) == 1).all() and (m.get(bias) == 0).all()
        if form == "fp8":
            drawn.append(weight_values(m.get(made.values), m.get(made.scales)))
        else:
            drawn.append(get(m, made.values))
    np.testing.assert_allclose(drawn[0].std(axis=1), 160**-0.5, rtol=0.3)
    assert abs(drawn[0].mean()) < 0.003
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).mean() > 0.9
    assert (drawn[0][:40] != drawn[0][128:]).mean() > 0.9
