"""Weights that the layers keep, their projections, and what a layer does not do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.fastdeploy_plugin import projections
from fd_dsa.fastdeploy_plugin.projections import IndexerProjections
from tests.fastdeploy_plugin.layers import Rows, hidden_states, make_layer
from tests.fastdeploy_plugin.steps import make_backend, registered

STEP = [(40, 0, 40)]


def run(rows: Rows, layer: Any, seed: int = 0) -> np.ndarray:
    with paddle.no_grad():
        return np.array(layer(rows.step(STEP), hidden_states(40, seed)))


class BFloat16Weight:
    """A parameter whose values are bfloat16, as far as our code looks at it."""

    def __init__(self, owner: Any) -> None:
        self.values = owner.weight.detach().astype("bfloat16")
        del owner.weight
        owner.weight = self

    def detach(self) -> Any:
        return self.values


def test_norm_weights_are_copied_once_and_refreshed_in_place() -> None:
    with registered():
        backend = make_backend()
        rows, layer = Rows(backend), make_layer()
        norm = BFloat16Weight(layer.kv_a_layernorm)
        before = run(rows, layer)
        norms = backend.norms_of(0, layer.kv_a_layernorm, layer.indexer)
        kept = norms.kv_norm_weight
        assert kept.dtype == np.float32
        norm.values = norm.values * 2
        assert np.abs(run(rows, layer) - before).max() < 1e-3
        backend.refresh_weights()
        assert backend.norms_of(0, layer.kv_a_layernorm, layer.indexer) is norms
        assert norms.kv_norm_weight is kept
        assert np.abs(run(rows, layer) - before).max() > 1e-3


class BlockWiseFP8LinearMethod:
    """FastDeploy's method of a layer, as far as our code looks at it."""

    quant_config = SimpleNamespace(weight_block_size=[128, 128])


def in_fp8(linear: Any) -> Any:
    """A layer with `--quantization block_wise_fp8`, loaded: e4m3 [out, in], a scale a block."""
    weight = np.asarray(linear.weight).T.copy()
    scale = np.zeros([-(-size // 128) for size in weight.shape], np.float32)
    for row, column in np.ndindex(*scale.shape):
        block = np.s_[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
        scale[row, column] = np.abs(weight[block]).max() / 448
        weight[block] /= scale[row, column]
    return SimpleNamespace(
        weight=paddle.to_tensor(weight).astype("float8_e4m3fn"),
        weight_scale_inv=paddle.to_tensor(scale),
        quant_method=BlockWiseFP8LinearMethod(),
    )


def both_of(projections: IndexerProjections, hidden: Any) -> list[np.ndarray]:
    return [np.array(one) for one in projections.one_launch(hidden, None)]


def test_block_fp8_weights_are_dequantised_once_and_refreshed_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projections, "on_device", lambda tensor: True)
    with registered():
        backend, plain, hidden = make_backend(), make_layer().indexer, hidden_states(5)
        wk, weights_proj = in_fp8(plain.wk), in_fp8(plain.weights_proj)
        layer = SimpleNamespace(layer_id=0, wk=wk, weights_proj=weights_proj)
        made = backend.projections_of(layer, hidden)
        assert made.is_one_launch and backend.projections_of(layer, hidden) is made
        before = both_of(made, hidden)
        for ours, linear in zip(before, (plain.wk, plain.weights_proj), strict=True):
            exact = np.asarray(hidden) @ np.asarray(linear.weight)
            assert np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()
        addresses = [copy.data_ptr() for copy in made.copies]
        wk.weight_scale_inv.copy_(wk.weight_scale_inv * 2, False)
        np.testing.assert_array_equal(both_of(made, hidden)[0], before[0])
        backend.refresh_weights()
        after = both_of(made, hidden)
        np.testing.assert_allclose(after[0], 2 * before[0], rtol=1e-6)
        np.testing.assert_array_equal(after[1], before[1])
        assert [copy.data_ptr() for copy in made.copies] == addresses


@pytest.mark.parametrize(
    "change",
    [{}, {"dtype": "int32"}, {"shape": [1, 3, 1]}, {"shape": [2, 3]}],
    ids=["read", "packed scales", "rank", "blocks"],
)
def test_scales_of_another_form_are_left_to_fastdeploy(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "on_device", lambda tensor: True)
    lines: list[str] = []
    monkeypatch.setattr(projections, "log_once", lines.append)
    with registered():
        plain = make_layer().indexer
        wk, form = in_fp8(plain.wk), {"shape": [1, 3], "dtype": "float32"} | change
        wk.weight_scale_inv = paddle.zeros(**form)
        layer = SimpleNamespace(layer_id=0, wk=wk, weights_proj=plain.weights_proj)
        made = make_backend().projections_of(layer, hidden_states(5))
    assert made.is_one_launch is (change == {})
    assert all("neither plain nor block FP8 with float32 scales" in line for line in lines)
