"""Tiny random checkpoints for the comparison with Hugging Face, made of NumPy's seeded draws.

A case is a config.json and a seed. Both sides read the same folder: fd_dsa through its own
loader, transformers through `from_pretrained`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import read_config
from tests.models.drawn import in_drawn_order

BLOCK_SIZE = 16
GREEDY_PROMPT = 20
GREEDY_STEPS = 256
# around the edges of blocks of 16 and of chunks of 64
PROMPT_LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130)
# large enough that a norm with another eps moves logits beyond the tolerance
LARGE_EPS = 1e-2

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 24,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_V32 = _COMMON | {
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_GLM = _COMMON | {
    "model_type": "glm_moe_dsa",
    "architectures": ["GlmMoeDsaForCausalLM"],
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
    "num_hidden_layers": 4,
}
_YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}


@dataclass(frozen=True)
class Case:
    """One random model: what differs from the common configuration, and its seed."""

    name: str
    base: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the case."""
        return self.base | self.changes

    def prompt(self, length: int) -> list[int]:
        """Token ids of a prompt of the case."""
        rng = np.random.default_rng([self.seed, length])
        return rng.integers(2, self.config["vocab_size"], length).tolist()

    def write(self, folder: Path) -> Path:
        """Write config.json and model.safetensors; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        rng = np.random.default_rng(self.seed)
        tensors = {
            name: random_weight(rng, name, expected.shape)
            for name, expected in in_drawn_order(expected_tensors(read_config(folder))).items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor whose scale keeps activations near 1 and selections spread."""
    draw = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("e_score_correction_bias"):
        return draw * np.float32(0.1)
    if "norm" in name:
        return draw * np.float32(0.2) + np.float32(0.0 if name.endswith("bias") else 1.0)
    if len(shape) == 1:
        return draw * np.float32(0.1)
    if "embed_tokens" in name:
        # small enough that a tied head does not simply repeat its input
        return draw * np.float32(0.15)
    return draw / np.float32(math.sqrt(shape[1]))


CASES = {
    case.name: case
    for case in (
        Case("v32", _V32, seed=1),
        Case("v32-yarn", _V32, {"rope_scaling": _YARN}, seed=2),
        Case("v32-yarn-groups", _V32, {"rope_scaling": _YARN} | _GROUPS, seed=3),
        Case("v32-topk-past-context", _V32, {"index_topk": 400} | _GROUPS, seed=4),
        Case(
            "v32-topk-16-tied-head", _V32, {"index_topk": 16, "tie_word_embeddings": True}, seed=5
        ),
        Case(
            "v32-bias-32-heads",
            _V32,
            {"attention_bias": True, "index_n_heads": 32, "rms_norm_eps": LARGE_EPS},
            seed=6,
        ),
        Case("glm", _GLM, seed=11),
        Case("glm-shared", _GLM, {"index_topk_freq": 2, "index_skip_topk_offset": 2}, seed=12),
        Case(
            "glm-types",
            _GLM,
            {
                "indexer_types": ["full", "shared", "shared", "full"],
                "index_n_heads": 32,
                "rms_norm_eps": LARGE_EPS,
            },
            seed=13,
        ),
        Case("glm-pattern-groups", _GLM, {"index_topk_pattern": "FSFS"} | _GROUPS, seed=14),
        Case("glm-topk-past-context", _GLM, {"index_topk": 400}, seed=15),
        Case(
            "glm-topk-64",
            _GLM,
            {"index_topk": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
            seed=16,
        ),
    )
}
