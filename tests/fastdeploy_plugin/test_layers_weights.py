"""What the layers keep of weights, how the projections run, and what a layer does not do."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.fastdeploy_plugin import projections
from fd_dsa.fastdeploy_plugin.projections import IndexerProjections
from tests.fastdeploy_plugin.layers import Rows, hidden_states, make_layer
from tests.fastdeploy_plugin.steps import config, make_backend, registered

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


def test_one_float32_table_for_all_layers() -> None:
    with registered():
        backend = make_backend()
        layers = [make_layer(layer_id=layer_id, loaded=False) for layer_id in range(3)]
        tables = [
            backend.cos_sin_of(rotary)
            for layer in layers
            for rotary in (layer.rotary_emb, layer.indexer_rotary_emb)
        ]
        assert all(table is tables[0] for table in tables)
        assert tables[0].dtype == np.float32
        np.testing.assert_array_equal(tables[0], np.asarray(layers[0].rotary_emb.cos_sin_cache))
        fd_config = config()
        fd_config.model_config.rope_theta = 5e5
        other = make_layer(fd_config, loaded=False)
        assert backend.cos_sin_of(other.rotary_emb) is not tables[0]


class Recorder:
    """An overlap that says what it was asked to fork."""

    def __init__(self, overlap: Any) -> None:
        self.overlap, self.forked = overlap, []

    def run(self, num_tokens: int, work: Any, project: Any, *args: Any) -> Any:
        self.forked.append((num_tokens, project.__name__))
        return self.overlap.run(0, work, project, *args)


def in_fp8(**settings: Any) -> Any:
    """The configuration of a server with `--quantization block_wise_fp8`."""
    fd_config = config(**settings)
    module = import_module("fastdeploy.model_executor.layers.quantization.block_wise_fp8")
    fd_config.quant_config = module.BlockWiseFP8Config()
    return fd_config


@pytest.mark.parametrize(("weights", "one"), [("host", False), ("plain", True), ("fp8", True)])
def test_only_one_launch_runs_beside_the_attentions_projections(
    weights: str, one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weights != "host":
        monkeypatch.setattr(projections, "on_device", lambda tensor: True)
    with registered():
        fd_config = (in_fp8 if weights == "fp8" else config)()
        backend = make_backend(fd_config)
        rows, layer = Rows(backend), make_layer(fd_config)
        meta = rows.step(STEP)
        backend.core.overlap = recorder = Recorder(backend.core.overlap)
        with paddle.no_grad():
            outputs = [np.array(layer(meta, hidden_states(40))) for _ in range(2)]
        assert recorder.forked == [(40, "one_launch") if one else (0, "two_gemms")] * 2
        monkeypatch.undo()
        for out in outputs:
            np.testing.assert_allclose(out, run(rows, layer), rtol=1e-4, atol=1e-5)


def both_of(projections: IndexerProjections, hidden: Any) -> list[np.ndarray]:
    return [np.array(one) for one in projections.one_launch(hidden, None)]


def test_block_fp8_weights_are_dequantised_once_and_refreshed_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projections, "on_device", lambda tensor: True)
    with registered():
        backend = make_backend()
        plain, layer = make_layer().indexer, make_layer(in_fp8()).indexer
        hidden = hidden_states(5)
        made = backend.projections_of(layer, hidden)
        assert made.is_one_launch and backend.projections_of(layer, hidden) is made
        before = both_of(made, hidden)
        # of e4m3 weights, with a scale a block
        for ours, linear in zip(before, (plain.wk, plain.weights_proj), strict=True):
            exact = np.asarray(hidden) @ np.asarray(linear.weight)
            assert np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()
        addresses = [copy.data_ptr() for copy in made._copies]
        with paddle.no_grad():
            scale = layer.wk.weight_scale_inv
            scale.copy_(scale * 2, False)
        np.testing.assert_array_equal(both_of(made, hidden)[0], before[0])
        backend.refresh_weights()
        after = both_of(made, hidden)
        np.testing.assert_allclose(after[0], 2 * before[0], rtol=1e-6)
        np.testing.assert_array_equal(after[1], before[1])
        assert [copy.data_ptr() for copy in made._copies] == addresses


@pytest.mark.parametrize(
    "change",
    [{"dtype": "int32"}, {"shape": [1, 3, 1]}, {"shape": [2, 3]}],
    ids=["packed scales", "rank", "blocks"],
)
def test_scales_of_another_form_are_left_to_fastdeploy(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "on_device", lambda tensor: True)
    lines: list[str] = []
    monkeypatch.setattr(projections, "_log_once", lines.append)
    with registered():
        indexer = make_layer(in_fp8()).indexer
        form = {"shape": [1, 3], "dtype": "float32"} | change
        del indexer.wk.weight_scale_inv
        indexer.wk.weight_scale_inv = paddle.zeros(**form)
        made = make_backend().projections_of(indexer, hidden_states(5))
    assert not made.is_one_launch
    assert "neither plain nor block FP8 with float32 scales" in lines[0]
