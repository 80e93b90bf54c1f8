"""Small model folders for tests, their safetensors files written byte by byte."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import config_from_dict
from tests.models.drawn import in_drawn_order

SCALE_SUFFIX = "_scale_inv"

TINY: dict[str, Any] = {
    "model_type": "deepseek_v32",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "index_n_heads": 3,
    "index_head_dim": 8,
    "index_topk": 5,
    "max_position_embeddings": 128,
}
TINY_GLM = TINY | {
    "model_type": "glm_moe_dsa",
    "n_group": 1,
    "topk_group": 1,
    "indexer_types": ["full", "shared", "full"],
    "attention_bias": True,
}
# matrices of several blocks whose last ones are not full
TINY_FP8 = TINY | {
    "hidden_size": 160,
    "kv_lora_rank": 136,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}
# rope_scaling of DeepSeek-V3.2's config.json
YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def f32(values: np.ndarray) -> Stored:
    """float32 values."""
    return Stored("F32", values.shape, values.astype("<f4").tobytes())


def f16(values: np.ndarray) -> Stored:
    """float16 values, rounded."""
    return Stored("F16", values.shape, values.astype("<f2").tobytes())


def bf16(values: np.ndarray) -> Stored:
    """The upper halves of float32 values, that is bfloat16 rounded towards zero."""
    bits = values.astype("<f4").view("<u4") >> 16
    return Stored("BF16", values.shape, bits.astype("<u2").tobytes())


def f8(codes: np.ndarray) -> Stored:
    """e4m3 bytes."""
    return Stored("F8_E4M3", codes.shape, codes.astype(np.uint8).tobytes())


def header_of(tensors: dict[str, Stored]) -> dict[str, Any]:
    """The header of a file that holds these tensors in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    return header


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    """A file of a header's length, the header and data, sound or not."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_safetensors(path: Path, tensors: dict[str, Stored]) -> None:
    """A sound file, its data at a multiple of 8 bytes."""
    header = json.dumps(header_of(tensors)).encode()
    header += b" " * (-len(header) % 8)
    write_raw(path, header, b"".join(tensor.data for tensor in tensors.values()))


def write_shards(folder: Path, tensors: dict[str, Stored], num_shards: int) -> None:
    """Shards that take turns, and their index."""
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        write_safetensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_tensors(fields: dict[str, Any], seed: int = 0) -> dict[str, Stored]:
    """Every expected tensor of a configuration, with small random float32 values."""
    rng = np.random.default_rng(seed)
    expected = in_drawn_order(expected_tensors(config_from_dict(fields)))
    return {
        name: f32(rng.standard_normal(tensor.shape, dtype=np.float32))
        for name, tensor in expected.items()
    }


def write_folder(
    folder: Path, fields: dict[str, Any], tensors: dict[str, Stored] | None = None
) -> Path:
    """A model folder of one file; None makes random tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = random_tensors(fields) if tensors is None else tensors
    write_safetensors(folder / "model.safetensors", tensors)
    return folder
