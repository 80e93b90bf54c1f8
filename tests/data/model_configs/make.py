"""Writes the JSON files beside it: what transformers 5.23 saves for small configurations.

They prove that the reader understands the form with `rope_parameters` and `mlp_layer_types`.
Run it with transformers installed; the committed files come from version 5.23.0.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import DeepseekV32Config, GlmMoeDsaConfig, PreTrainedConfig

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 7,
    "max_position_embeddings": 512,
    "first_k_dense_replace": 1,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def save(config: PreTrainedConfig, name: str) -> None:
    """Write config.json of a configuration under another name."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        (HERE / name).write_text((Path(folder) / "config.json").read_text())


save(
    DeepseekV32Config(**SIZES, n_group=4, topk_group=2, rope_theta=50000.0, rope_scaling=YARN),
    "deepseek_v32_yarn.json",
)
save(
    GlmMoeDsaConfig(
        **SIZES,
        index_topk_freq=4,
        index_skip_topk_offset=2,
        attention_bias=True,
        eos_token_id=[1, 2],
    ),
    "glm_moe_dsa_shared.json",
)
