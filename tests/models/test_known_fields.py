"""Harmless fields of config.json load silently; other fields that no family reads are refused."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.errors import ConfigError
from fd_dsa.models.registry import config_from_dict, read_config
from tests.models.folders import TINY, TINY_GLM
from tests.models.published import GLM_52, GLM_53_FP8, PUBLISHED, V4_FLASH, V32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def read(folder: Path, fields: dict[str, Any], *, allow_unknown: bool = False) -> Any:
    """Configuration of a folder with these fields in its config.json."""
    (folder / "config.json").write_text(json.dumps(fields))
    return read_config(folder, allow_unknown=allow_unknown)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_load_silently(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    config = read(folder, PUBLISHED[name])
    assert config.hidden_size == PUBLISHED[name]["hidden_size"]
    assert not caplog.records


def test_schedule_of_the_release_is_the_list_of_its_successor(folder: Path) -> None:
    listed = tuple(GLM_53_FP8["indexer_types"])
    assert read(folder, GLM_52).indexer_types == read(folder, GLM_53_FP8).indexer_types == listed


@pytest.mark.oracle
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("use_diff", [True, False], ids=["changes", "all fields"])
def test_files_that_transformers_saves_again_load_silently(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, use_diff: bool
) -> None:
    from transformers import AutoConfig

    wanted = read(folder, PUBLISHED[name])
    theirs = AutoConfig.from_pretrained(folder)
    theirs.to_json_file(folder / "config.json", use_diff=use_diff)
    assert "transformers_version" in json.loads((folder / "config.json").read_text())
    # transformers logs, too
    caplog.clear()
    assert read_config(folder) == wanted
    assert not caplog.records


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_quantization_that_transformers_saves_loads_silently(
    folder: Path, caplog: pytest.LogCaptureFixture, model_type: str
) -> None:
    from transformers import AutoConfig, FineGrainedFP8Config

    theirs = AutoConfig.for_model(model_type)
    theirs.quantization_config = FineGrainedFP8Config(modules_to_not_convert=["lm_head"])
    theirs.save_pretrained(folder)
    assert read_config(folder).weight_block_size == (128, 128)
    assert not caplog.records


V4 = V4_FLASH | {"num_hidden_layers": 4}
UNKNOWN: list[tuple[dict[str, Any], str, Any]] = [
    (TINY, "swiglu_limit", 10.0),
    (TINY_GLM, "swiglu_limit", 7),
    (TINY_GLM, "index_kpool", 4),
    (TINY_GLM, "mla_nope", True),
    (TINY_GLM, "mla_norm_eps", 1e-6),
    (TINY_GLM, "index_k_norm_type", "rms"),
    (TINY_GLM, "moe_router_dtype", "bfloat16"),
    (TINY, "text_config", {"hidden_size": 32}),
    (TINY, "an_unknown_switch", False),
    (TINY, "rope_scaling.strange", 3),
    (TINY, "rope_parameters.short_factor", [1.0]),
    (TINY | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.strange", 1),
    (V4, "index_topk_freq", 2),
    (V4, "index_kpool", 4),
    (V4, "engram_layer_ids", [1]),
    (V4, "rope_scaling.strange", 1),
]


def with_field(fields: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one more field, whose path may begin with the name of an object."""
    name, _, inner = path.partition(".")
    return fields | {name: (fields.get(name) or {}) | {inner: value} if inner else value}


@pytest.mark.parametrize(("fields", "path", "value"), UNKNOWN, ids=lambda one: str(one)[:30])
def test_unknown_fields_are_refused_or_accepted_and_named(
    folder: Path, fields: Any, path: str, value: Any
) -> None:
    wanted = read(folder, fields)
    with pytest.raises(ConfigError) as caught:
        read(folder, with_field(fields, path, value))
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'}: {path}: got ")
    assert "--allow-unknown-config-fields" in message and "\n" not in message
    accepted = read(folder, with_field(fields, path, value), allow_unknown=True)
    assert accepted == wanted and accepted.unknown_fields == (path,)


def test_random_names_are_refused_together(folder: Path) -> None:
    draw = random.Random(48)
    for fields in (TINY, TINY_GLM, V4):
        for _ in range(20):
            names = {
                "".join(draw.choices(string.ascii_lowercase + "_", k=draw.randint(1, 30))) + "_x"
                for _ in range(draw.randint(1, 12))
            }
            values = {
                name: draw.choice([0, 1, -2.5, "", "x", True, False, [], {}]) for name in names
            }
            with pytest.raises(ConfigError) as caught:
                read(folder, fields | values)
            assert all(name in str(caught.value) for name in names)
            found = read(folder, fields | values, allow_unknown=True).unknown_fields
            assert found == tuple(sorted(names))


def test_messages_stay_short(folder: Path) -> None:
    many = {f"unknown_{i}": "x" * 10_000 for i in range(1000)}
    with pytest.raises(ConfigError, match="and 988 more") as caught:
        read(folder, TINY | many)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        (TINY, {"swiglu_limit": None}),
        (TINY, {"swiglu_limit": 0.0, "index_kpool": 1, "mla_nope": False}),
        (TINY, {"any_name_that_is_null": None, "rope_scaling": None}),
        (TINY, {"index_topk_freq": None, "index_topk_pattern": None, "indexer_types": None}),
        (TINY, {"index_topk_freq": 1, "index_skip_topk_offset": None}),
        (TINY, {"num_nextn_predict_layers": None}),
        (TINY, {"num_key_value_heads": None, "qk_head_dim": None, "attention_bias": None}),
        (TINY, {"tie_word_embeddings": None, "mlp_bias": None, "quantization_config": None}),
        (TINY, {"hidden_size": 32.0, "moe_layer_freq": 1.0, "num_key_value_heads": 2.0}),
        (TINY, {"eos_token_id": [1.0], "bos_token_id": 0.0}),
        (TINY, {"indexer_types": ["full"] * 4, "num_nextn_predict_layers": 1}),
        (TINY, {"layer_types": ["deepseek_sparse_attention"] * 4}),
        (TINY, {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
        (TINY, {"rope_scaling": {"rope_type": None, "type": "default", "factor": 4}}),
        (TINY, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
        (TINY, {"head_dim": 192, "id2label": {"0": "a"}, "temperature": 0.3}),
        (TINY_GLM, {"n_group": None, "topk_group": None}),
        (TINY_GLM, {"n_group": None}),
        (TINY_GLM, {"indexer_types": ["full", "shared", "full", "shared"]}),
        (TINY_GLM, {"indexer_types": None, "index_topk_pattern": "FSFF"}),
        (V4, {"index_topk_freq": None}),
        (V4, {"index_topk_freq": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
        (V4, {"rope_parameters": V4["rope_scaling"]}),
        (V4, {"mlp_layer_types": ["hash_moe"] * 3 + ["moe", "moe"], "num_hash_layers": 3}),
        (V4, {"compress_ratios": [float(one) for one in V4["compress_ratios"]]}),
    ],
    ids=lambda one: ", ".join(one)[:40],
)
def test_harmless_forms_change_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], more: dict[str, Any]
) -> None:
    wanted = read(folder, fields)
    found = read(folder, fields | more)
    if more.get("num_nextn_predict_layers"):
        assert found.indexer_types == wanted.indexer_types
    else:
        assert found == wanted
    assert not caplog.records


def test_block_sizes_in_every_form() -> None:
    for size in ([128, 128], (128, 128), [128.0, 128.0]):
        section = {"quant_method": "fp8", "weight_block_size": size}
        found = config_from_dict(TINY | {"quantization_config": section})
        assert found.weight_block_size == (128, 128)


def test_entries_past_the_layers_of_multi_token_prediction_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"indexer_types: got .* a list of 61 entries"):
        config_from_dict(V32 | {"indexer_types": ["full"] * 63})
    with pytest.raises(ConfigError, match="topk_group: got 2"):
        config_from_dict(TINY | {"n_group": None, "topk_group": 2})


DIFFERENT = {
    "axk2": "low-rank gates",
    "deepseek_v41": "n-gram memories",
    "deepseek_v41_text": "n-gram memories",
    "dots3_note": "sliding-window layers",
    "glm5_next": "linear attention",
    "hy_v4": "sinks in attention",
    "mistral_large4": "capped logits",
}


@pytest.mark.parametrize("model_type", DIFFERENT)
def test_families_that_are_known_but_not_served_name_the_difference(
    folder: Path, model_type: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model_type: got '{model_type}'") as caught:
        read(folder, {"model_type": model_type, "index_topk": 2048})
    assert "has DeepSeek Sparse Attention but is not served yet: " in str(caught.value)
    assert DIFFERENT[model_type] in str(caught.value)


@pytest.mark.parametrize("fields", [{"index_topk": 2048}, {"text_config": {"index_topk": 64}}])
def test_families_with_the_fields_of_an_indexer_are_not_called_dense(
    folder: Path, fields: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="not served yet: fd_dsa does not know its layers"):
        read(folder, {"model_type": "brand_new"} | fields)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama", ["glm5_next"], 3])
def test_other_families_hear_what_serves_them(folder: Path, model_type: Any) -> None:
    with pytest.raises(ConfigError, match="models with DeepSeek Sparse Attention; others"):
        read(folder, {"model_type": model_type, "text_config": None})
