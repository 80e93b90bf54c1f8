"""The layers: FastDeploy's parameters, and the results of the embedded engine's layer."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.errors import ConfigError, MissingStepError
from fd_dsa.fastdeploy_plugin.settings import interleaves_indexer_rope, shares_selection
from fd_dsa.ops import _gemm
from tests.fastdeploy_plugin.layers import (
    Embedded,
    Rows,
    hidden_states,
    make_backend,
    make_layer,
)
from tests.fastdeploy_plugin.names import MODELS
from tests.fastdeploy_plugin.steps import config, registered
from tests.reference.fp8 import ref_index_key

TREES = ["pr7367", "develop", "raising_import"]
# prompts below and above the demo model's index_topk of 256, chunks, decoding, drafts, idle rows
STEPS = [
    [(60, 0, 60)],
    [(20, 60, 20), (140, 0, 140)],
    [(0, 80, 1), (100, 140, 100)],
    [(0, 81, 1), (0, 240, 3), (0, 0, 0)],
    [(0, 82, 2), (0, 243, 1), (9, 0, 9)],
]


def test_parameters_are_those_of_upstream() -> None:
    """Buffers that nothing reads are gone, and a decoder layer finds ours by name."""

    def parameters(layer: Any) -> list[tuple[str, list[int], Any]]:
        return [(name, list(p.shape), p.dtype) for name, p in layer.named_parameters()]

    with registered():
        models, fd_config = sys.modules[MODELS], config()
        decoder = models.DeepSeekV3DecoderLayer(fd_config, prefix="deepseek_v3.layers.0")
        ours = decoder.self_attn
        assert type(ours) is models.DeepseekV32DSAAttention
        assert type(ours.indexer) is models.Indexer
        theirs = type(ours).__mro__[2](fd_config, 0, "deepseek_v3.layers.0.self_attn")
        assert parameters(ours) == parameters(theirs)
        upstream = models.Indexer.__mro__[2](fd_config, 0)
        for name in ("offsets", "lengths"):
            assert hasattr(upstream, name) and not hasattr(ours.indexer, name)


def test_a_prompt_token_sees_the_keys_of_its_window() -> None:
    """The window of token 50 of 60 is whole, then its first 20 keys, then empty."""
    outputs = []
    with registered():
        backend, layer = make_backend(config()), make_layer()
        for window in (None, (0, 20), (30, 30)):
            meta = Rows(backend).step([(60, 0, 60)])
            if window is not None:
                meta.indexer_attn_mask_offsets[100:102] = paddle.to_tensor(window, "int32")
            with paddle.no_grad():
                outputs.append(np.array(layer(meta, hidden_states(60))))
    whole, first_keys, no_keys = outputs
    for other in first_keys, no_keys:
        differs = np.flatnonzero((other != whole).any(axis=1))
        assert differs.tolist() == [50]
    assert not no_keys[50].any()


@pytest.mark.parametrize("name", TREES)
def test_a_layer_gives_what_the_embedded_engine_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First and later chunks, decoding, drafts and idle rows; launches past the true count."""
    # GEMMs by Paddle's operator on both sides: bytes of the caches hold last bits of their sums
    monkeypatch.setattr(_gemm._thread, "sgemm", None)
    with registered(name):
        backend = make_backend(config(max_num_batched_tokens=256))
        rows, layer = Rows(backend), make_layer()
        embedded = Embedded(rows)
        for number, lengths in enumerate(STEPS):
            count = sum(now for _, _, now in lengths)
            hidden = hidden_states(count + 2, number)
            with paddle.no_grad():
                found = layer(rows.step(lengths, count + 2), hidden)
            expected = embedded(lengths, np.asarray(hidden)[:count])
            assert np.abs(expected).max() > 0.01
            np.testing.assert_allclose(np.asarray(found)[:count], expected, rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(rows.caches, embedded.caches, strict=True):
            same = np.asarray(ours) == np.asarray(theirs)
            assert same.mean() > 0.9999
            assert np.asarray(ours).any()


def test_layers_without_tokens_and_before_their_backend() -> None:
    with registered():
        rows, layer = Rows(make_backend()), make_layer(loaded=False)
        meta = rows.step([(0, 0, 0)], 0)
        assert layer(meta, paddle.zeros([0, 384])).shape == [0, 384]
        meta = SimpleNamespace(attn_backend=object())
        with pytest.raises(MissingStepError, match="the runner was made before the plug-in"):
            layer(meta, hidden_states(3))


@pytest.mark.parametrize(
    ("model_type", "own", "asked", "interleaved"),
    [
        ("deepseek_v32", None, None, False),
        ("glm_moe_dsa", None, None, True),
        ("deepseek_v32", True, None, True),
        ("glm_moe_dsa", False, None, False),
        ("deepseek_v32", None, "1", True),
        ("glm_moe_dsa", True, "0", False),
        ("deepseek_v32", True, "", True),
    ],
)
def test_pairing_of_the_indexers_rope(
    model_type: str,
    own: bool | None,
    asked: str | None,
    interleaved: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FD_DSA_INDEXER_ROPE_INTERLEAVE", raising=False)
    if asked is not None:
        monkeypatch.setenv("FD_DSA_INDEXER_ROPE_INTERLEAVE", asked)
    model = SimpleNamespace(model_type=model_type)
    if own is not None:
        model.indexer_rope_interleave = own
    assert interleaves_indexer_rope(model) is interleaved
    monkeypatch.setenv("FD_DSA_INDEXER_ROPE_INTERLEAVE", "half")
    with pytest.raises(ConfigError, match="FD_DSA_INDEXER_ROPE_INTERLEAVE: got 'half'"):
        interleaves_indexer_rope(model)


def index_keys(caches: Any) -> np.ndarray:
    """Codes of the index keys, [slots, 128]: a block has all codes, then all scales."""
    return np.asarray(caches[1]).reshape(-1, 64 * 132)[:, : 64 * 128].reshape(-1, 128)


@pytest.mark.parametrize("asked", ["1", "0"])
def test_the_switch_reproduces_upstreams_index_keys(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_DSA_INDEXER_ROPE_INTERLEAVE", asked)
    with registered():
        backend = make_backend(config(max_num_batched_tokens=128))
        rows, layer = Rows(backend), make_layer()
        meta = rows.step([(100, 0, 100)])
        hidden = hidden_states(100)
        with paddle.no_grad():
            layer(meta, hidden)
            k = layer.indexer.k_norm(layer.indexer.wk(hidden))
            pe = k[:, :64].unsqueeze(1)
            # FastDeploy's own pairing, whatever the model's is
            layer.indexer_rotary_emb(meta.position_ids, paddle.zeros([100, 1, 64]), pe)
            k = paddle.concat([pe.reshape([-1, 64]), k[:, 64:]], axis=-1)
        theirs = np.stack([ref_index_key(key, "ue8m0")[0] for key in k.numpy()])
        ours = index_keys(rows.caches)[np.asarray(meta.slot_mapping)]
        same = (ours == theirs).mean(axis=1)
    # position 0 turns nothing
    assert same[0] == 1
    assert bool(same[1:].mean() > 0.999) is (asked == "1")


def shared_config(**overrides: Any) -> Any:
    fd_config = config(model_type="glm_moe_dsa", **overrides)
    fd_config.model_config.rope_parameters = {"rope_theta": 10000.0}
    fd_config.model_config.indexer_types = ["full", "shared", "shared", "full", "full", "shared"]
    return fd_config


def test_shared_layers_take_the_selection_before_them() -> None:
    with registered():
        fd_config = shared_config()
        backend = make_backend(fd_config)
        rows = Rows(backend, num_layers=3)
        layers = [make_layer(fd_config, layer_id) for layer_id in range(3)]
        hidden = hidden_states(40)
        meta = rows.step([(40, 0, 40)])
        with paddle.no_grad():
            layers[0](meta, hidden)
            chosen = backend.shared_selection
            for layer in layers[1:]:
                out = layer(meta, hidden)
                assert backend.shared_selection is chosen
                assert np.isfinite(np.asarray(out)).all()
        # their latents are written, index keys they have none
        assert [bool(np.asarray(cache).any()) for cache in rows.caches] == [
            *(True, True),
            *(True, False),
            *(True, False),
        ]
        with pytest.raises(MissingStepError, match="layer 1 has no selection"):
            layers[1](rows.step([(40, 0, 40)]), hidden)


def test_who_shares() -> None:
    with registered():
        fd_config = shared_config()
        assert [shares_selection(fd_config, layer) for layer in range(6)] == [
            *(False, True, True),
            *(False, False, True),
        ]
        assert not shares_selection(config(), 1)
        by_schedule = config(model_type="glm_moe_dsa")
        by_schedule.model_config.index_topk_freq = 4
        found = [shares_selection(by_schedule, layer) for layer in range(6)]
        assert found == [False, False, True, True, True, False]
        # the one layer of a proposer has an indexer of its own
        fd_config.speculative_config.model_type = "mtp"
        assert not shares_selection(fd_config, 1)
        with pytest.raises(ConfigError, match="full layers only in deepseek_v32"):
            broken = config()
            broken.model_config.indexer_types = ["full"] + ["shared"] * 5
            shares_selection(broken, 1)
