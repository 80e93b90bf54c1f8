"""Shapes of published checkpoints, and the memory plans that docs/several-gpus.md shows of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks._gpu_engine_model import FP8, WIDTHS
from benchmarks._harness import table
from fd_dsa.doctor.plan import GPU_GIB, as_lines, plan
from tests.models.published import V4_FLASH

V32 = WIDTHS | {"num_hidden_layers": 61, "first_k_dense_replace": 3, "quantization_config": FP8}
GLM = V32 | {
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 78,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 154880,
    "max_position_embeddings": 202752,
    "rope_scaling": None,
}
V4_PRO = V4_FLASH | {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "moe_intermediate_size": 3072,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "index_topk": 1024,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128, *([4, 128] * 29), 4, 0],
}
_FOUR_BITS: dict[str, dict[str, Any]] = {
    "NVFP4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    "INT4 (AWQ)": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    },
    "W4AFP8": {"quant_method": "w4afp8", "group_size": 128, "weight_block_size": [128, 128]},
}
MODELS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3.2-REAP-345B": V32 | {"n_routed_experts": 128},
    "DeepSeek-V3.2": V32,
    "GLM-5": GLM,
    "DeepSeek-V4-Flash": V4_FLASH,
    "DeepSeek-V4-Pro": V4_PRO,
} | {
    f"{name}, {kind}": model | {"quantization_config": fields}
    for name, model in (("DeepSeek-V3.2", V32), ("GLM-5", GLM))
    for kind, fields in _FOUR_BITS.items()
}
"""Name -> its config.json."""
# two GPUs of 141 GB hold this model
_RANKS = {"DeepSeek-V4-Flash": (2, 4, 8)}


@cache
def plan_of(name: str, ranks: int) -> dict[str, Any]:
    """Return the memory plan of a model on `ranks` GPUs, as `fd-dsa doctor --plan` makes it."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(MODELS[name]))
        return plan(folder, ranks) | {"model": name}


def plan_lines() -> str:
    """Return the output of `fd-dsa doctor --plan` for four GPUs, as a code block."""
    lines = "\n".join(as_lines(plan_of("DeepSeek-V3.2-REAP-345B", 4)))
    return f"```\n{lines}\n```\n"


def plan_table(head: Sequence[str] = ("model", "GPUs", "weights on each"), no: str = "no") -> str:
    """Return a table of the tokens that GPUs hold in addition to the weights of each model.

    Args:
        head: heads of the first three columns, in the language of the page.
        no: cell of a GPU that is too small.
    """
    rows = [[*head, *(f"{gib} GB" for gib in GPU_GIB)]]
    for name in MODELS:
        for ranks in _RANKS.get(name, (4, 8)):
            found = plan_of(name, ranks)
            weights = sum(found["parts"].values()) / 2**30
            # the last cache dtype is the smallest
            gpus = [*found["caches"].values()][-1]["gpus"].values()
            tokens = [f"{gpu['tokens']:,}" if gpu["tokens"] else no for gpu in gpus]
            rows.append([name, str(ranks), f"{weights:.1f} GiB", *tokens])
    return table(rows)
