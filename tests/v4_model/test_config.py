"""Every form of DeepSeek-V4's config.json says the same, and what cannot be served is refused."""

from __future__ import annotations

from typing import Any

import pytest

from fd_dsa.errors import ConfigError
from fd_dsa.models.deepseek_v4.config import CSA, HCA, WINDOW
from fd_dsa.models.registry import config_from_dict

YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
# as released checkpoints have it: 46 ratios of 43 layers, the last ones of draft layers
RATIOS = [0, 0, *([4, 128] * 20), 4, 0, 0, 0]
RELEASED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "compress_ratios": RATIOS,
    "num_hash_layers": 3,
    "qk_rope_head_dim": 64,
    "rope_scaling": YARN,
    "num_nextn_predict_layers": 3,
    "topk_method": "noaux_tc",
}
# as transformers writes it
SAVED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "layer_types": [WINDOW, WINDOW, *([CSA, HCA] * 20), CSA],
    "compress_rates": {CSA: 4, HCA: 128},
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
    "partial_rotary_factor": 0.125,
    "num_nextn_predict_layers": 3,
    "rope_parameters": {
        "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125},
        "compress": {
            "rope_type": "yarn",
            "rope_theta": 160000.0,
            "partial_rotary_factor": 0.125,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "attention_factor": 1.0,
        },
    },
}
FORMS = {
    "released": RELEASED,
    "saved": SAVED,
    "flat rope_parameters": RELEASED | {"rope_scaling": None, "rope_parameters": YARN},
    "old rates": RELEASED | {"compress_rate_csa": 4, "compress_rate_hca": 128},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_model(form: str, caplog: pytest.LogCaptureFixture) -> None:
    config = config_from_dict(FORMS[form])
    assert config == config_from_dict(RELEASED)
    assert config.layer_types == tuple(SAVED["layer_types"])
    assert config.mlp_layer_types == tuple(SAVED["mlp_layer_types"])
    assert (config.qk_rope_head_dim, config.max_dense_keys) == (64, 2051)
    assert (config.main_rope.type, config.main_rope.theta) == ("default", 10000)
    rope = config.compress_rope
    assert (rope.type, rope.theta, rope.factor) == ("yarn", 160000, 16)
    assert not caplog.records


@pytest.mark.oracle
def test_what_transformers_writes() -> None:
    from transformers import DeepseekV4Config as Theirs

    theirs = {k: v for k, v in RELEASED.items() if k != "topk_method"}
    saved = Theirs(**theirs, rms_norm_eps=1e-6).to_dict()
    assert config_from_dict(saved) == config_from_dict(RELEASED)


REFUSED: dict[str, Any] = {
    "compress_ratios": [0, 2, 4],
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "attention_bias": True,
    "num_key_value_heads": 8,
    "o_groups": 7,
    "index_head_dim": 32,
    "qk_rope_head_dim": 63,
    "partial_rotary_factor": 0.25,
    "num_experts_per_tok": 300,
    "intermediate_size": 4096,
    "compress_rates": {CSA: 128, HCA: 4},
    "mlp_layer_types": ["dense"] * 43,
    "layer_types": ["full_attention"] * 43,
    "rope_scaling": YARN | {"attention_factor": 1.2},
}


@pytest.mark.parametrize("field", REFUSED)
def test_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(RELEASED | {field: REFUSED[field]})
    named = {"partial_rotary_factor": "qk_rope_head_dim"}
    text = str(caught.value)
    assert text.startswith("config.json: ") and named.get(field, field) in text
    assert "\n" not in text and "allowed: " in text


def test_no_layers() -> None:
    with pytest.raises(ConfigError, match="layer_types or compress_ratios"):
        config_from_dict({"model_type": "deepseek_v4"})
