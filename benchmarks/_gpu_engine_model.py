"""The models and cases of `gpu_engine`, and the least that a case can take."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# measured: copies, and GEMMs in FP8 and bfloat16
BYTES_PER_S, FP8_PER_S, BF16_PER_S = 4.3e12, 1.5e15, 0.78e15
WIDTHS: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "torch_dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "vocab_size": 129280,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


SMALL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "vocab_size": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "index_n_heads": 4,
    "index_topk": 64,
    "n_routed_experts": 16,
    "max_position_embeddings": 4096,
}
"""Widths of a dry run."""


class Shape(NamedTuple):
    """Layers and experts of a model with DeepSeek-V3.2's widths, and its number of GPUs."""

    layers: int = 7
    dense: int = 1
    experts: int = 256
    ranks: int = 1


def shape_of(ranks: int, layers: int | None) -> Shape:
    """Return the layers that fit one GPU, or DeepSeek-V3.2-REAP-345B, whole or cut, for more."""
    whole = Shape() if ranks == 1 else Shape(61, 3, 128, ranks)
    return (
        whole if layers is None else whole._replace(layers=layers, dense=min(whole.dense, layers))
    )


def of_ranks(name: str, ranks: int) -> str:
    """Return the name of a result, which ends with the number of GPUs if there are several."""
    return name if ranks == 1 else f"{name}_{ranks}"


class Case(NamedTuple):
    """A load, and the number of its runs. The figure of several runs is the median."""

    target: str
    kind: str
    batch: int
    prompt: int
    new: int
    runs: int = 2


CASES = {
    "decode-1x4k": Case("P21", "decode", 1, 4096, 128, 5),
    "decode-8x4k": Case("P21", "decode", 8, 4096, 128),
    "decode-32x4k": Case("P21", "decode", 32, 4096, 128),
    "decode-128x4k": Case("P21", "decode", 128, 4096, 64, 1),
    "decode-1x32k": Case("P21", "decode", 1, 32768, 128),
    "decode-32x32k": Case("P21", "decode", 32, 32768, 64, 1),
    "prefill-1x8k": Case("P22", "prefill", 1, 8192, 1),
    "prefill-8x4k": Case("P22", "prefill", 8, 4096, 1),
    "prefill-1x32k": Case("P22", "prefill", 1, 32768, 1),
    "prefill-4x2k": Case("P22", "prefill", 4, 2048, 1),
    "mixed-64x2k": Case("P23", "mixed", 64, 2048, 128),
}
# figure of a kind, its unit, and True if less is better
FIGURES = {
    "decode": ("tpot_ms", "ms a token", True),
    "prefill": ("tok_s", "prompt tokens/s", False),
    "mixed": ("tok_s", "tokens/s", False),
}


def write_model(folder: str | Path, shape: Shape, fields: Mapping[str, Any]) -> str:
    """Write the config.json of a model with some fields replaced. Returns the folder."""
    config = WIDTHS | {"num_hidden_layers": shape.layers, "first_k_dense_replace": shape.dense}
    config |= {"n_routed_experts": shape.experts, **fields}
    Path(folder, "config.json").write_text(json.dumps(config))
    return str(folder)


@contextlib.contextmanager
def engine_options(
    args: argparse.Namespace,
    shape: Shape,
    config: Mapping[str, Any],
    fields: Mapping[str, Any] | None = None,
    *,
    parent: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the options of a worker's engine, whose model folder exists meanwhile.

    Args:
        args: flags of `rig_parser`. A dry run has small widths, on the CPU.
        shape: layers, experts and ranks.
        config: fields of EngineConfig.
        fields: further fields of config.json; None selects weights in FP8.
        parent: folder of the model folder; None selects the system's temporary folder.
    """
    is_dry = getattr(args, "dry", False)
    if fields is None:
        fields = {"quantization_config": FP8}
    if is_dry:
        fields = {k: v for k, v in fields.items() if k != "quantization_config"} | SMALL
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield worker_options(args, write_model(folder, shape, fields), config)


def worker_options(
    args: argparse.Namespace, model: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of a worker's engine for a model folder. Arguments as above."""
    device = "cpu" if getattr(args, "dry", False) else "gpu"
    return {"model": model, "rig": args.rig, "config": dict(config), "device": device}


def floor(case: Case, shape: Shape) -> float | None:
    """Return the shortest time of a case in its unit, or None for a mixed load.

    Decode: weights, of the experts only those that even routing hits, and caches. Prefill: GEMMs,
    and attention un-absorbed where all keys are attended to. Ranks share heads, experts and the
    head; each has the first projections, the indexer and the caches.
    """
    w, layers, ranks = WIDTHS, shape.layers, shape.ranks
    hidden, heads, topk = w["hidden_size"], w["num_attention_heads"] // ranks, w["index_topk"]
    latent, rope, value = w["kv_lora_rank"], w["qk_rope_head_dim"], w["v_head_dim"]
    nope, index = w["qk_nope_head_dim"], w["index_n_heads"] * w["index_head_dim"]
    expert = 3 * hidden * w["moe_intermediate_size"] / ranks
    fp8 = (w["q_lora_rank"] + latent + rope) * hidden + heads * value * hidden
    fp8 += w["q_lora_rank"] * (heads * (nope + rope) + index)
    bf16 = heads * (nope + value) * latent
    sparse = layers - shape.dense
    fp8 = layers * fp8 + sparse * expert + shape.dense * 3 * hidden * w["intermediate_size"] / ranks
    if case.kind == "decode":
        number, chosen = shape.experts, w["num_experts_per_tok"]
        hit = number * (1 - (1 - chosen / number) ** case.batch)
        head = 2 * w["vocab_size"] * hidden / ranks
        read = fp8 + sparse * hit * expert + layers * 2 * bf16 + head
        keys = min(case.prompt, topk) * 656 + case.prompt * (w["index_head_dim"] + 4)
        return 1e3 * (read + case.batch * layers * keys) / BYTES_PER_S
    if case.kind == "mixed":
        return None
    fp8 += sparse * w["num_experts_per_tok"] * expert
    # of a token, on average
    attended = topk - topk * topk / 2 / case.prompt if case.prompt > topk else case.prompt / 2
    width = 2 * latent + rope if case.prompt > topk else nope + rope + value
    scores = index * case.prompt / 2 if case.prompt > topk else 0
    attention = layers * (attended * heads * width + bf16)
    return 1 / (2 * (fp8 + layers * scores) / FP8_PER_S + 2 * attention / BF16_PER_S)
