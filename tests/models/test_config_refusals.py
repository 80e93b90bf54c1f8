"""A value that would change the result is refused, with file, field, value and rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.errors import ConfigError
from fd_dsa.models.config_reader import MAX_FILE_BYTES, parse_json
from fd_dsa.models.registry import config_from_dict, read_config
from tests.models.folders import TINY, TINY_GLM

YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}
FP8 = {"quant_method": "fp8"}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"model_type": "deepseek_v3"}, "model_type", "'deepseek_v3'"),
    ({"hidden_act": "gelu"}, "hidden_act", "'silu'"),
    ({"scoring_func": "softmax"}, "scoring_func", "'sigmoid'"),
    ({"topk_method": "greedy"}, "topk_method", "'noaux_tc'"),
    ({"moe_layer_freq": 2}, "moe_layer_freq", "got 2"),
    ({"moe_layer_freq": True}, "moe_layer_freq", "got True"),
    ({"mlp_bias": True}, "mlp_bias", "got True"),
    ({"mlp_bias": 0}, "mlp_bias", "got 0"),
    ({"rope_interleave": False}, "rope_interleave", "got False"),
    ({"indexer_rope_interleave": "yes"}, "indexer_rope_interleave", "true or false"),
    ({"norm_topk_prob": 1}, "norm_topk_prob", "true or false"),
    ({"hidden_size": "32"}, "hidden_size", "'32'"),
    ({"hidden_size": None}, "hidden_size", "None"),
    ({"hidden_size": True}, "hidden_size", "True"),
    ({"num_hidden_layers": 0}, "num_hidden_layers", "at least 1"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers", "at most 1024"),
    ({"n_routed_experts": 10**9}, "n_routed_experts", "at most 87381 in 3 layers"),
    ({"n_routed_experts": 10**30}, "n_routed_experts", "at most 2147483647"),
    ({"max_position_embeddings": 10**9}, "max_position_embeddings", "at most 16777216"),
    ({"index_topk": 10**30}, "index_topk", "at most 65536"),
    ({"n_shared_experts": 0}, "n_shared_experts", "at least 1"),
    ({"rms_norm_eps": 0}, "rms_norm_eps", "above 0"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps", "finite"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps", "a number"),
    ({"rms_norm_eps": 1e-300}, "rms_norm_eps", "a number that float32 holds"),
    ({"rope_theta": 1e308}, "rope_theta", "a number that float32 holds"),
    ({"routed_scaling_factor": -1}, "routed_scaling_factor", "above 0"),
    ({"rope_scaling": YARN, "rope_theta": 1}, "rope_scaling.rope_type", "above 1"),
    ({"rope_scaling": YARN | {"factor": 1e39}}, "rope_scaling.factor", "that float32 holds"),
    ({"rope_scaling": YARN | {"beta_fast": -1}}, "rope_scaling.beta_fast", "at least 0"),
    ({"rope_scaling": YARN | {"beta_slow": -1}}, "rope_scaling.beta_slow", "at least 0"),
    ({"rope_scaling": YARN | {"mscale": -1}}, "rope_scaling.mscale", "at least 0"),
    ({"rope_scaling": YARN | {"type": None}}, "rope_scaling.factor", "needs a rope_type"),
    (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 1.5}},
        "original_max_position_embeddings",
        "an integer",
    ),
    ({"num_key_value_heads": 1}, "num_key_value_heads", "got 1"),
    ({"qk_head_dim": 64}, "qk_head_dim", "got 64, allowed: 10"),
    ({"qk_rope_head_dim": 5}, "qk_rope_head_dim", "even"),
    ({"index_head_dim": 2}, "index_head_dim", "at least qk_rope_head_dim"),
    ({"n_group": 3}, "n_group", "divisor of n_routed_experts (4)"),
    ({"n_group": 4}, "n_group", "two experts a group"),
    ({"topk_group": 3}, "topk_group", "at most n_group, 2"),
    ({"num_experts_per_tok": 3}, "num_experts_per_tok", "at most 2"),
    ({"num_experts": 8}, "n_routed_experts", "one number"),
    ({"mlp_layer_types": ["dense"]}, "mlp_layer_types", "3 entries"),
    ({"mlp_layer_types": ["dense", "sparse", "other"]}, "mlp_layer_types[2]", "'other'"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types[0]", "'indexed_attention'"),
    ({"indexer_types": ["full", "shared", "full"]}, "indexer_types", "deepseek_v32"),
    ({"index_topk_freq": 2}, "index_topk_freq", "deepseek_v32"),
    ({"bos_token_id": 50}, "bos_token_id", "vocab_size 50"),
    ({"bos_token_id": [1, 2]}, "bos_token_id", "null or one id"),
    ({"eos_token_id": [1, -1]}, "eos_token_id", "0 to 49"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type", "'yarn'"),
    ({"rope_scaling": "yarn"}, "rope_scaling", "an object"),
    ({"rope_scaling": {**YARN, "rope_type": "default"}}, "rope_scaling.type", "must agree"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor", "a number"),
    ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor", "at least 1"),
    ({"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate", "True"),
    ({"rope_scaling": {**YARN, "attention_factor": 1}}, "attention_factor", "null"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    ({"rope_theta": 0}, "rope_theta", "above 0"),
    (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}},
        "rope_parameters.rope_theta",
        "got 20000.0, allowed: 10000.0, as in the other place",
    ),
    (
        {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 8}},
        "rope_scaling",
        "the same as rope_parameters",
    ),
    (
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
        "original_max_position_embeddings",
        "as in the other place",
    ),
    ({"quantization_config": {**FP8, "quant_method": "hqq"}}, "quant_method", "'fp8'"),
    ({"quantization_config": {}}, "quantization_config.quant_method", "None"),
    ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt", "'e4m3'"),
    ({"quantization_config": {**FP8, "activation_scheme": "static"}}, "activation_scheme", "dyn"),
    ({"quantization_config": {**FP8, "scale_fmt": "mx"}}, "scale_fmt", "'mx'"),
    ({"quantization_config": {**FP8, "expert_dtype": "fp4"}}, "expert_dtype", "'fp8'"),
    ({"quantization_config": {**FP8, "weight_block_size": 128}}, "weight_block_size", "two"),
    ({"quantization_config": {**FP8, "weight_block_size": [128, 0]}}, "weight_block_size", "two"),
]


@pytest.mark.parametrize(("fields", "name", "text"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_values(fields: dict[str, Any], name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(TINY | fields, "folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: "), message
    assert f"{name}: got" in message, message
    assert text in message, message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"indexer_types": ["shared", "full", "full"]}, "indexer_types"),
        ({"indexer_types": None, "index_topk_pattern": "SFF"}, "index_topk_pattern"),
        ({"indexer_types": None, "index_topk_pattern": "FXF"}, "index_topk_pattern"),
        ({"indexer_types": None, "index_topk_pattern": "FF"}, "index_topk_pattern"),
        (
            {"indexer_types": None, "index_topk_freq": 4, "index_skip_topk_offset": 0},
            "index_topk_freq",
        ),
    ],
)
def test_schedules_that_have_no_first_choice(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {name}: got"):
        config_from_dict(TINY_GLM | fields)


def test_missing_model_type() -> None:
    with pytest.raises(ConfigError, match=r"model_type: got None, .*deepseek_v32 or glm_moe_dsa"):
        config_from_dict({"hidden_size": 32})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff{}", "cannot be read"),
        (b"[1]", "JSON list"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the name 'b' is there twice in one object"),
        (rb'{"a": ["\ud83d"]}', r"'\\ud83d' .*surrogates not allowed"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=text) as caught:
        read_config(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_escapes_that_are_whole_surrogate_pairs_are_text() -> None:
    assert parse_json(rb'{"a": ["\ud83d\ude00 \\ud83d"]}') == {"a": ["\U0001f600 \\ud83d"]}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_files_that_have_no_end(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    path = tmp_path / name
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is no regular file"):
        read_config(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ConfigError, match=f"allowed: at most {MAX_FILE_BYTES}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"index_topk": 1 << 31}, "index_topk: got 2147483648, allowed: at most 65536"),
        ({"vocab_size": 1 << 30}, "vocab_size: got 1073741824, allowed: at most 16777216"),
        ({"q_lora_rank": 1 << 21}, "q_lora_rank: got 2097152, allowed: at most 1048576"),
        ({"model_type": "x" * 1_000_000}, "model_type: got 'xxxx"),
        ({"rope_scaling": ["x" * 1_000_000] * 99}, "rope_scaling: got ['xxxx"),
    ],
)
def test_sizes_and_texts_of_a_file_are_bounded(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(TINY | fields)
    assert text in str(caught.value) and len(str(caught.value)) < 2000


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: file not found"):
        read_config(tmp_path)


def test_top_k_of_generation_config_has_the_values_of_requests() -> None:
    for value in (-1, 0, 50):
        assert config_from_dict(TINY, generation={"top_k": value}).generation == {"top_k": value}
    with pytest.raises(ConfigError, match="top_k: got -2, allowed: an integer of at least -1"):
        config_from_dict(TINY, generation={"top_k": -2})


def test_generation_config_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id: got 50"):
        config_from_dict(TINY, generation={"eos_token_id": 50})
