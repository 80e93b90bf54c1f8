"""The layers: FastDeploy's parameters, pairing of the RoPE, shared selections."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.errors import ConfigError, MissingStepError
from fd_dsa.fastdeploy_plugin.settings import interleaves_indexer_rope, shares_selection
from fd_dsa.fastdeploy_plugin.take_over import is_ours
from tests.fastdeploy_plugin.layers import (
    Rows,
    hidden_states,
    make_layer,
)
from tests.fastdeploy_plugin.names import MODELS, registered_model
from tests.fastdeploy_plugin.steps import config, make_backend, registered
from tests.reference.fp8 import ref_index_key


def test_parameters_are_those_of_upstream() -> None:
    """FastDeploy's objects get our classes; buffers that no code reads are gone."""

    def parameters(layer: Any) -> list[tuple[str, list[int], Any]]:
        return [(name, list(p.shape), p.dtype) for name, p in layer.named_parameters()]

    with registered():
        models, fd_config = sys.modules[MODELS], config(num_hidden_layers=2)
        ours = registered_model()(fd_config)
        theirs = models.DeepseekV32ForCausalLM(fd_config)
        assert parameters(ours) == parameters(theirs) and ours.name() == theirs.name()
        for mine, other in zip(ours.model.layers, theirs.model.layers, strict=True):
            for part, base in (
                (mine.self_attn, models.DeepseekV32DSAAttention),
                (mine.self_attn.indexer, models.Indexer),
            ):
                assert is_ours(type(part)) and isinstance(part, base)
            assert not is_ours(type(other.self_attn))
            for name in ("offsets", "lengths"):
                assert hasattr(other.self_attn.indexer, name)
                assert not hasattr(mine.self_attn.indexer, name)


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
        # the place of an array in memory may round the other rows differently
        differs = np.flatnonzero(~np.isclose(other, whole, rtol=0, atol=1e-5).all(axis=1))
        assert differs.tolist() == [50]
    assert not no_keys[50].any()


def test_layers_without_tokens_and_before_their_backend() -> None:
    with registered():
        rows, layer = Rows(make_backend()), make_layer(loaded=False)
        meta = rows.step([(0, 0, 0)], 0)
        assert layer(meta, paddle.zeros([0, 384])).shape == [0, 384]
        meta = SimpleNamespace(attn_backend=object())
        with pytest.raises(MissingStepError, match="the runner was made before FastDeploy loaded"):
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
        # FastDeploy's own pairing, whatever the model's is
        cos, sin = np.split(layer.indexer_rotary_emb.cos_sin_cache.numpy()[:100], 2, axis=1)
        keys = k.numpy()
        even, odd = keys[:, :64:2].copy(), keys[:, 1:64:2].copy()
        keys[:, :64:2], keys[:, 1:64:2] = even * cos - odd * sin, odd * cos + even * sin
        theirs = np.stack([ref_index_key(key, "ue8m0")[0] for key in keys])
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
