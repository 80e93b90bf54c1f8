"""config.json of both families, in the form of the releases and of transformers 5.23."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.models.config import ModelConfig, RopeConfig
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import config_from_dict, read_config
from tests.models.folders import TINY, TINY_GLM, YARN

DATA = Path(__file__).parents[1] / "data" / "model_configs"


def read(fields: dict[str, Any]) -> ModelConfig:
    return config_from_dict(fields)


def test_defaults_of_deepseek_v32_are_the_release() -> None:
    config = read({"model_type": "deepseek_v32", "rope_theta": 10000, "rope_scaling": YARN})
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (129280, 7168, 61)
    assert (config.n_routed_experts, config.n_group, config.topk_group) == (256, 8, 4)
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (64, 128, 2048)
    assert config.qk_head_dim == 192
    assert config.softmax_scale == pytest.approx(0.1352337789, rel=1e-9)
    assert config.rope == RopeConfig(10000.0, "yarn", 40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert not config.indexer_rope_interleave
    assert config.num_indexer_layers == 61
    assert config.mlp_layer_types == ("dense",) * 3 + ("sparse",) * 58
    assert config.eos_token_ids == (1,)
    assert config.rms_norm_eps == 1e-6


def test_defaults_of_glm_moe_dsa_are_the_release() -> None:
    config = read({"model_type": "glm_moe_dsa"})
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (154880, 6144, 78)
    assert (config.n_group, config.topk_group, config.index_n_heads) == (1, 1, 32)
    assert config.softmax_scale == 0.0625
    assert config.indexer_rope_interleave
    assert config.rms_norm_eps == 1e-5


def test_demo_folder() -> None:
    config = read_config(demo_model_path())
    assert config.model_type == "deepseek_v32"
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim) == (512, 64, 128)


def test_files_written_by_transformers(caplog: pytest.LogCaptureFixture) -> None:
    v32, glm = (
        json.loads((DATA / name).read_text())
        for name in ("deepseek_v32_yarn.json", "glm_moe_dsa_shared.json")
    )
    with caplog.at_level(logging.WARNING):
        config = read(v32)
        shared = read(glm)
    assert not caplog.records
    assert config.rope == RopeConfig(50000.0, "yarn", 4.0, 128, 32.0, 1.0, 1.0, 1.0)
    assert config.mlp_layer_types == ("dense", "sparse", "sparse", "sparse")
    assert (config.n_group, config.topk_group) == (4, 2)
    assert shared.rope == RopeConfig(10000.0)
    assert shared.indexer_types == tuple(glm["indexer_types"])
    assert shared.attention_bias
    assert shared.eos_token_ids == (1, 2)


@pytest.mark.parametrize("with_theta", [True, False])
def test_both_forms_of_rope_read_alike(with_theta: bool) -> None:
    old = read(TINY | {"rope_theta": 7.0, "rope_scaling": YARN})
    new_form = {**YARN, "rope_type": "yarn", "rope_theta": 7.0}
    new = read(TINY | {"rope_parameters": new_form})
    both = TINY | {"rope_parameters": new_form, "rope_scaling": YARN}
    assert old.rope == new.rope == read(both | ({"rope_theta": 7} if with_theta else {})).rope


def test_null_rope_sections_mean_plain_rope() -> None:
    fields = TINY | {"rope_theta": 8e6, "rope_scaling": None, "rope_parameters": None}
    assert read(fields).rope == RopeConfig(8e6)


def test_yarn_without_optional_fields() -> None:
    scaling = {"rope_type": "yarn", "factor": 4, "mscale": None}
    config = read(TINY | {"rope_scaling": scaling})
    assert config.rope == RopeConfig(10000.0, "yarn", 4.0, 128, 32.0, 1.0, 0.0, 0.0)
    # without mscale_all_dim the attention scores are not scaled
    assert config.softmax_scale == pytest.approx(10**-0.5)


@pytest.mark.parametrize(
    ("fields", "full_layers"),
    [
        ({}, range(78)),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, [0, 1, *range(2, 78, 4)]),
        ({"index_topk_freq": 3}, [0, *range(1, 78, 3)]),
        ({"index_topk_pattern": "F" + "S" * 76 + "F"}, [0, 77]),
        ({"index_topk_pattern": ["full"] + ["shared"] * 77}, [0]),
        ({"indexer_types": ["full"] * 2 + ["shared"] * 76, "index_topk_freq": 4}, [0, 1]),
    ],
)
def test_schedule_of_shared_indexers(fields: dict[str, Any], full_layers: Any) -> None:
    config = read({"model_type": "glm_moe_dsa"} | fields)
    assert [i for i, kind in enumerate(config.indexer_types) if kind == "full"] == [*full_layers]
    assert config.num_indexer_layers == len([*full_layers])


def test_mlp_layer_types_count_before_first_k_dense_replace() -> None:
    types = ["sparse", "dense", "sparse"]
    config = read(TINY | {"mlp_layer_types": types, "first_k_dense_replace": 3})
    assert config.mlp_layer_types == tuple(types)
    assert read(TINY | {"first_k_dense_replace": 9}).mlp_layer_types == ("dense",) * 3


@pytest.mark.parametrize("name", ["indexed_attention", "deepseek_sparse_attention"])
def test_both_names_of_dsa_layers(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = read(TINY | {"layer_types": [name] * 3})
    assert not caplog.records
    assert config == read(TINY)


def test_other_names_of_the_number_of_experts() -> None:
    fields = {name: value for name, value in TINY.items() if name != "n_routed_experts"}
    assert read(fields | {"num_local_experts": 6}).n_routed_experts == 6
    assert read(fields | {"num_experts": 6, "n_routed_experts": 6}).n_routed_experts == 6


def test_quantization() -> None:
    section = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0"}
    assert read(TINY).weight_block_size is None
    assert read(TINY | {"quantization_config": section}).weight_block_size == (128, 128)
    section |= {"weight_block_size": [32, 64], "modules_to_not_convert": ["lm_head"]}
    assert read(TINY | {"quantization_config": section}).weight_block_size == (32, 64)


def test_pairing_of_the_indexer_is_read() -> None:
    assert read(TINY_GLM).indexer_rope_interleave
    assert not read(TINY_GLM | {"indexer_rope_interleave": False}).indexer_rope_interleave


def test_generation_config_adds_to_config(tmp_path: Path) -> None:
    fields = TINY | {"eos_token_id": [3, 1], "bos_token_id": None, "pad_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    generation = {"eos_token_id": [1, 7], "top_p": 0.9, "top_k": 20, "temperature": 0.6}
    generation |= {"min_p": 0.05, "repetition_penalty": 1.1, "max_new_tokens": 256}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = read_config(tmp_path)
    assert config.eos_token_ids == (3, 1, 7)
    del generation["eos_token_id"]
    # the name that requests have for it
    generation["max_tokens"] = generation.pop("max_new_tokens")
    assert config.generation == generation


def test_generation_config_without_sampling_is_greedy() -> None:
    config = config_from_dict(TINY, generation={"do_sample": False, "temperature": 0.6})
    assert config.generation == {"temperature": 0.0}
    assert read(TINY).generation == {}


@pytest.mark.parametrize(
    ("model_type", "layers", "parameters", "gigabytes", "moe_layer", "outside"),
    [("deepseek_v32", 61, 672e9, 674, 11.5, 3.7), ("glm_moe_dsa", 78, 744e9, 746, 9.9, 3.8)],
)
def test_released_sizes(
    model_type: str,
    layers: int,
    parameters: float,
    gigabytes: int,
    moe_layer: float,
    outside: float,
) -> None:
    """docs/models.md has these figures: FP8 takes one byte, what stays bfloat16 two."""
    config = read({"model_type": model_type})
    tensors = expected_tensors(config)
    count = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    size = {name: count[name] * (2 - tensor.quantisable) for name, tensor in tensors.items()}
    layer = sum(n for name, n in size.items() if name.startswith("model.layers.10."))
    rest = sum(n for name, n in size.items() if not name.startswith("model.layers."))
    assert config.num_hidden_layers == layers
    assert sum(count.values()) == pytest.approx(parameters, abs=0.5e9)
    assert sum(size.values()) / 1e9 == pytest.approx(gigabytes, abs=0.5)
    assert (layer / 1e9, rest / 1e9) == pytest.approx((moe_layer, outside), abs=0.05)
