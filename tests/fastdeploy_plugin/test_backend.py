"""The backend as FastDeploy constructs it: attributes, caches, refusals, disaggregation."""

from __future__ import annotations

import sys
import typing
from importlib import import_module
from typing import Any

import pytest

from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.fastdeploy_plugin import steps
from tests.fastdeploy_plugin.names import ATTENTION
from tests.fastdeploy_plugin.steps import (
    config,
    construct,
    forward_meta,
    make_backend,
    registered,
    upstream_class,
    write,
)

SERVED = ["pr7367", "develop"]


@pytest.mark.parametrize("name", SERVED)
def test_attributes_are_those_of_upstreams_constructor(name: str) -> None:
    with registered(name):
        fd_config = config()
        theirs, ours = construct(upstream_class(), fd_config), make_backend(fd_config)
        assert isinstance(ours, type(theirs))
        names = vars(theirs).keys()
        assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}
        shape = ours.get_kv_cache_shape(max_num_blocks=5, kv_cache_quant_type="uint8")
        assert shape == ([5, 1, 64, 656], [], [5, 64, 132])


def test_what_upstream_reads_of_a_backend_is_its_own() -> None:
    """FastDeploy's static graphs resolve the annotations of whatever has the marker's attribute."""
    with registered():
        backend = make_backend()
        assert backend.get_attention_meta() is None
        assert list(type(backend).__infer_dynamic_dims_fields__) == ["attention_metadata"]
        assert typing.get_type_hints(type(backend)).keys() == {"attention_metadata"}
        meta = forward_meta(backend)
        backend.init_attention_metadata(meta)
        record = backend.get_attention_meta()
        file = sys.modules[f"{ATTENTION}.dsa_attention_backend"]
        assert isinstance(record, file.DSAAttentionMetadata)
        assert record.block_tables is meta.block_tables


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("block_size", 16, "block_size: got 16.*--block-size 64"),
        ("kv_lora_rank", 256, "kv_lora_rank: got 256"),
        ("index_head_dim", 64, "index_head_dim: got 64"),
    ],
)
def test_sizes_without_caches_are_refused(field: str, value: int, words: str) -> None:
    with registered():
        fd_config = config()
        part = fd_config.cache_config if field == "block_size" else fd_config.model_config
        setattr(part, field, value)
        with pytest.raises(ConfigError, match=words):
            make_backend(fd_config)


def test_a_model_that_upstreams_constructor_cannot_read() -> None:
    """GLM-5: a rope_scaling without a factor, rope_theta elsewhere; the configuration stays."""
    with registered():
        fd_config = config(model_type="glm_moe_dsa")
        model = fd_config.model_config
        del model.rope_theta
        model.rope_parameters = {"rope_theta": 8e6, "rope_type": "default"}
        model.rope_scaling = {"rope_type": "default", "rope_theta": 1e6}
        before = dict(vars(model))
        backend = make_backend(fd_config)
        assert vars(model) == before and backend.rope_theta == 8e6
        width = model.qk_nope_head_dim + model.qk_rope_head_dim
        assert backend.config.softmax_scale == pytest.approx(width**-0.5)
        with pytest.raises(KeyError):
            construct(upstream_class(), config(rope_scaling={"rope_type": "default"}))
        yarn = config(rope_scaling={"factor": 40, "mscale_all_dim": 1.0, "type": "yarn"})
        assert make_backend(yarn).config.softmax_scale == pytest.approx(width**-0.5 * 1.3688879**2)


def test_a_draft_model_is_refused_before_it_fails() -> None:
    """By whatever cache manager: there is no draft model with DSA that could use the caches."""
    with registered():
        fd_config = config(method="mtp", num_speculative_tokens=1)
        # the backend of the main model is made all the same
        assert make_backend(fd_config).num_layers_draft_model == 1
        fd_config.speculative_config.model_type = "mtp"
        with pytest.raises(ConfigError, match=r"method: got 'mtp'.*two cache shapes of three"):
            make_backend(fd_config)


def test_other_models_find_the_static_form_under_the_name_that_is_ours() -> None:
    """Sliding windows of MLA and of fallback models (#8060, #8090) call FastDeploy's own."""
    with registered():
        ours = import_module(ATTENTION).DSAAttentionBackend
        assert ours.forward_static is upstream_class().forward_static


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of FastDeploy's operators of disaggregation in their order, from now on."""
    made: list[tuple[Any, ...]] = []

    def recorder(name: str) -> Any:
        return lambda *args: (made.append((name, *args)), f"from {name}")[1]

    operators = import_module(f"{ATTENTION}.ops")
    for names in steps.OPERATORS.values():
        for name in names:
            monkeypatch.setattr(operators, name, recorder(name))
    return made


def test_disaggregation_by_chunk_announces_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with registered():
        made = recorded(monkeypatch)
        fd_config = config(pd_disaggregation_mode="per_chunk")
        backend = make_backend(fd_config)
        meta = forward_meta(backend)
        backend.init_attention_metadata(meta)
        # our runner's hook asks once more
        backend.init_attention_metadata(meta)
        num_layers = fd_config.model_config.num_hidden_layers
        lengths = meta.seq_lens_encoder, meta.seq_lens_this_time, meta.seq_lens_decoder
        expected = ("init_kv_signal_per_query", *lengths, backend.rank, num_layers)
        assert len(made) == 1
        found = zip(made[0], expected, strict=True)
        assert all(one is other or one == other for one, other in found)
        dummy = forward_meta(backend, is_dummy_or_profile_run=True)
        backend.init_attention_metadata(dummy)
        assert len(made) == 1
        write(backend, dummy)
        assert len(made) == 1


def test_disaggregation_by_query_announces_step_and_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with registered():
        made = recorded(monkeypatch)
        backend = make_backend(config(pd_disaggregation_mode="per_query", start_layer_index=3))
        write(backend, forward_meta(backend))
        signal = "from open_shm_and_get_meta_signal"
        assert made == [
            ("open_shm_and_get_meta_signal", backend.rank, int(backend.device_id), False),
            ("init_signal_layerwise", signal, 3),
        ]
        record = backend.attention_metadata
        assert record.kv_signal_metadata == signal
        assert record.kv_signal_data_list[0] == "from init_signal_layerwise"
        assert len(record.kv_signal_data_list) == backend.num_layers


def test_disaggregation_without_its_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with registered():
        monkeypatch.delattr(import_module(f"{ATTENTION}.ops"), "init_signal_layerwise")
        with pytest.raises(BackendUnavailable, match="pd_disaggregation_mode: got 'per_query'"):
            make_backend(config(pd_disaggregation_mode="per_query"))
        make_backend(config())
