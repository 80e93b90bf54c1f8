"""Writer of checkpoints with matrices in four bits, which shares no code with fd_dsa.

Codes, scales and zero points are drawn and packed as the text of a format says. Reading takes each
value out of its word by its row and column. So each folder has a twin with the same values in
float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import config_from_dict
from tests.models.folders import Stored, bf16, f32, write_safetensors
from tests.parity.cases import CASES, Case, random_weight
from tests.v4_model.cases import write_tokenizer
from tests.v4_model.quantised import (
    E2M1,
    E4M3,
    decode_fp8,
    loaded,
    quantise_fp8,
    stored_tensors,
)

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 192,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 64,
}
CASE = replace(CASES["v32"], name="four bits", changes=SIZES, seed=31)
GLM = replace(CASES["glm"], name="GLM in four bits", changes=SIZES, seed=32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(8))
Packed = tuple[dict[str, Stored], np.ndarray]
"""Tensors of a matrix by the end of their name, and its values."""


def i32(words: np.ndarray) -> Stored:
    """Words of eight codes."""
    return Stored("I32", words.shape, words.astype("<u4").tobytes())


def i64(values: np.ndarray) -> Stored:
    """Integers."""
    return Stored("I64", values.shape, values.astype("<i8").tobytes())


def pack(codes: np.ndarray, axis: int, order: tuple[int, ...] = IN_ORDER) -> np.ndarray:
    """Words whose nibble i holds the value `order[i]` of each eight along an axis."""
    eights = np.moveaxis(codes, axis, -1).astype(np.uint64)
    eights = eights.reshape(*eights.shape[:-1], -1, 8)
    words = sum(eights[..., value] << np.uint64(4 * i) for i, value in enumerate(order))
    return np.moveaxis(np.asarray(words).astype(np.uint32), -1, axis)


def nibble(words: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Value at a number of nibbles from the low end."""
    return ((words >> (4 * number).astype(np.uint32)) & 15).astype(np.int64)


def places(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each value."""
    return np.arange(shape[0])[:, None], np.arange(shape[1])[None]


def draw(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> tuple[Any, Any, Any]:
    """Codes [out, in], zero points 1 to 15 and float16 scales [out, groups]."""
    groups = -(-shape[1] // size)
    scales = (0.2 + 0.1 * rng.random((shape[0], groups))) / np.sqrt(shape[1])
    zeros = rng.integers(1, 16, (shape[0], groups))
    return rng.integers(0, 16, shape), zeros, scales.astype(np.float16)


def values_of(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 of integers, each product rounded once."""
    return ((codes - zeros) * scales.astype(np.float64)).astype(np.float32)


def half(scales: np.ndarray) -> Stored:
    """float16 scales."""
    return Stored("F16", scales.shape, np.ascontiguousarray(scales).tobytes())


@dataclass(frozen=True)
class Format:
    """A format, and where a model has it.

    Attributes:
        fields: `quantization_config`.
        quantise: tensors and values of a matrix.
        weight: end of the name of the codes.
        everywhere: True if attention has it, too; otherwise attention is as `others`.
        others: "bf16", or "fp8" and the end of the name of its scales.
        case: the model.
    """

    fields: dict[str, Any]
    quantise: Callable[[np.random.Generator, tuple[int, ...]], Packed]
    weight: str = "qweight"
    everywhere: bool = False
    others: str = "bf16"
    case: Case = field(default=CASE)


def gptq(
    *, offset: int = 1, symmetric: bool = False, ordered: bool = False, size: int = 128
) -> Any:
    """GPTQ: words along the input [in / 8, out], zero points along the output [groups, out / 8]."""

    def quantise(rng: np.random.Generator, shape: tuple[int, ...]) -> Packed:
        codes, zeros, scales = draw(rng, shape, size)
        zeros = np.full_like(zeros, 8) if symmetric else zeros
        group = np.arange(shape[1]) // size
        group = rng.permutation(group) if ordered else group
        words, packed = pack(codes.T, 0), pack(zeros.T - offset, 1)
        row, column = places(shape)
        found = nibble(words[column // 8, row], column % 8)
        points = nibble(packed[group[None], row // 8], row % 8) + offset
        tensors = {"qweight": i32(words), "qzeros": i32(packed), "scales": half(scales.T)}
        return tensors | {"g_idx": i32(group)}, values_of(found, points, scales.T[group[None], row])

    return quantise


def awq(*, zero: int | None = None) -> Any:
    """AWQ: words along the output with their own order, [in, out / 8] and [groups, out / 8]."""

    def quantise(rng: np.random.Generator, shape: tuple[int, ...]) -> Packed:
        codes, zeros, scales = draw(rng, shape, 128)
        zeros = zeros if zero is None else np.full_like(zeros, zero)
        words, packed = pack(codes.T, 1, AWQ_ORDER), pack(zeros.T, 1, AWQ_ORDER)
        row, column = places(shape)
        place = np.array([AWQ_ORDER.index(i) for i in range(8)])[row % 8]
        found = nibble(words[column, row // 8], place)
        points = nibble(packed[column // 128, row // 8], place)
        tensors = {"qweight": i32(words), "qzeros": i32(packed), "scales": half(scales.T)}
        return tensors, values_of(found, points, scales.T[column // 128, row])

    return quantise


def compressed(*, symmetric: bool, size: int = 128) -> Any:
    """INT4 of compressed-tensors: words along a row, zero points along a column."""

    def quantise(rng: np.random.Generator, shape: tuple[int, ...]) -> Packed:
        codes, zeros, scales = draw(rng, shape, size)
        words, packed = pack(codes, 1), pack(zeros, 0)
        row, column = places(shape)
        found = nibble(words[row, column // 8], column % 8)
        points = nibble(packed[row // 8, column // size], row % 8)
        tensors = {
            "weight_packed": i32(words),
            "weight_scale": half(scales),
            "weight_shape": i64(np.array(shape)),
        }
        if symmetric:
            points = np.full_like(points, 8)
        else:
            tensors["weight_zero_point"] = i32(packed)
        return tensors, values_of(found, points, scales[row, column // size])

    return quantise


def w4afp8(rng: np.random.Generator, shape: tuple[int, ...]) -> Packed:
    """Pack two's complement, two columns a byte, the first one low, with bfloat16 scales of 128."""
    codes, _, scales = draw(rng, shape, 128)
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
    row, column = places(shape)
    found = (packed[row, column // 2] >> (4 * (column % 2))) & 15
    signed = np.where(found > 7, found.astype(np.int64) - 16, found)
    stored = bf16(scales.astype(np.float32))
    wide = (np.frombuffer(stored.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    wide = wide.reshape(scales.shape)[row, column // 128]
    tensors = {
        "weight": Stored("I8", packed.shape, packed.tobytes()),
        "weight_scale_inv": stored,
        "input_scale": bf16(np.ones(1, np.float32)),
    }
    return tensors, values_of(signed, np.int64(0), wide)


def nvfp4(codes_end: str, global_end: str, input_end: str, *, divides: bool) -> Any:
    """Return a writer of NVFP4: e2m1 codes, e4m3 scales of 16, and one float32 scale."""

    def quantise(rng: np.random.Generator, shape: tuple[int, ...]) -> Packed:
        codes = rng.integers(0, 16, shape)
        packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
        scales = rng.integers(40, 127, (shape[0], shape[1] // 16)).astype(np.uint8)
        factor = np.float32(1 / (70 * np.sqrt(shape[1])) * (1 + rng.random()))
        factor = np.float32(1 / factor) if divides else factor
        row, column = places(shape)
        found = E2M1[(packed[row, column // 2] >> (4 * (column % 2))) & 15].astype(np.float32)
        wide = E4M3[scales].astype(np.float32)
        wide = wide / factor if divides else wide * factor
        one = np.array([factor]) if divides else np.array(factor)
        tensors = {
            codes_end: Stored("U8", packed.shape, packed.tobytes()),
            "weight_scale": Stored("F8_E4M3", scales.shape, scales.tobytes()),
            global_end: f32(one),
            input_end: f32(np.ones_like(one)),
        }
        return tensors, found * wide[row, column // 16]

    return quantise


def group(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """A group of modules of compressed-tensors, as llm-compressor 0.14 writes it."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "dynamic": False}
    weights |= {"observer": "memoryless_minmax", "symmetric": True} | more
    return {"targets": ["Linear"], "input_activations": None, "weights": weights}


def compressed_fields(kind: str, *groups: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config` of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": one for i, one in enumerate(groups)},
        "format": kind,
        "global_compression_ratio": None,
        "ignore": ["lm_head", "re:.*self_attn.*"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }


MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "config_groups": {"group_0": group(4, "float", "group", group_size=16)},
    "ignore": ["lm_head", "model.layers.1.mlp.gate"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.47.0"},
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": False}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "data_type": "int"}
NVFP4_GROUP = group(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
INT4_GROUP = group(4, "int", "group", group_size=128)
FORMATS = {
    "nvfp4 of modelopt": Format(
        MODELOPT,
        nvfp4("weight", "weight_scale_2", "input_scale", divides=False),
        "weight",
        everywhere=True,
    ),
    "nvfp4 of compressed-tensors": Format(
        compressed_fields("nvfp4-pack-quantized", NVFP4_GROUP),
        nvfp4("weight_packed", "weight_global_scale", "input_global_scale", divides=True),
        "weight_packed",
    ),
    "nvfp4 experts, fp8 attention": Format(
        compressed_fields(
            "mixed-precision", NVFP4_GROUP, group(8, "float", "block", block_structure=[128, 128])
        ),
        nvfp4("weight_packed", "weight_global_scale", "input_global_scale", divides=True),
        "weight_packed",
        others="weight_scale",
    ),
    "int4 of compressed-tensors": Format(
        compressed_fields("pack-quantized", INT4_GROUP), compressed(symmetric=True), "weight_packed"
    ),
    "int4 of compressed-tensors, zero points, groups of 32": Format(
        compressed_fields(
            "pack-quantized", group(4, "int", "group", group_size=32, symmetric=False)
        ),
        compressed(symmetric=False, size=32),
        "weight_packed",
        everywhere=True,
        case=GLM,
    ),
    "awq": Format(AWQ, awq(), everywhere=True),
    "gptq": Format(GPTQ, gptq(), case=GLM),
    "gptq, symmetric": Format(GPTQ | {"sym": True}, gptq(symmetric=True)),
    "gptq of version 2": Format(
        GPTQ | {"checkpoint_format": "gptq_v2", "dynamic": {"-:.*gate.*": {}}}, gptq(offset=0)
    ),
    "gptq, act-order": Format(GPTQ | {"desc_act": True}, gptq(ordered=True), everywhere=True),
    "gptq, whole rows": Format(GPTQ | {"group_size": -1}, gptq(size=1 << 20)),
    "auto-round as gptq": Format(
        AUTO_ROUND | {"sym": True, "packing_format": "auto_round:auto_gptq"}, gptq(symmetric=True)
    ),
    "auto-round as awq": Format(
        AUTO_ROUND | {"sym": False, "packing_format": "auto_round:auto_awq"}, awq()
    ),
    "w4afp8": Format(
        {"quant_method": "w4afp8"}, w4afp8, "weight", others="weight_scale_inv", case=GLM
    ),
}
_OUTSIDE = ("embed_tokens", "lm_head", "mlp.gate.", "norm", "weights_proj")


def stored(name: str, values: np.ndarray, kind: Format, rng: np.random.Generator) -> Packed:
    """A tensor as a format stores it, by its names, and its values in float32."""
    is_matrix = values.ndim == 2 and not any(part in name for part in _OUTSIDE)
    # W4AFP8 has experts in four bits only
    packed = ".experts." in name if "fp8" in kind.fields["quant_method"] else ".mlp." in name
    if is_matrix and (packed or kind.everywhere):
        tensors, decoded = kind.quantise(rng, values.shape)
        return {f"{name.removesuffix('weight')}{end}": one for end, one in tensors.items()}, decoded
    if is_matrix and kind.others != "bf16":
        codes, scales = quantise_fp8(values, float_scales=True)
        scale_name = name.removesuffix("weight") + kind.others
        fp8 = {name: Stored("F8_E4M3", codes.shape, codes.tobytes()), scale_name: scales}
        return fp8, decode_fp8(codes, scales)
    one = bf16(values)
    bits = np.frombuffer(one.data, "<u2").astype(np.uint32) << 16
    return {name: one}, bits.view(np.float32).reshape(values.shape)


def write_pair(folder: Path, kind: Format, *, mtp: bool = False) -> tuple[Path, Path]:
    """Write a folder in a format and its twin in float32, with tokenizers.

    Args:
        mtp: True adds a layer for multi-token prediction.
    """
    case, both = kind.case, (folder / "packed", folder / "twin")
    if mtp:
        case = replace(case, changes=case.changes | {"num_nextn_predict_layers": 1})
    for one in both:
        write_tokenizer(case.write(one))
    rng, tensors, twin = np.random.default_rng(case.seed), {}, {}
    values = load_file(both[0] / "model.safetensors")
    if mtp:
        expected = expected_tensors(config_from_dict(case.config).with_mtp_layer())
        layer = {name: one for name, one in expected.items() if name not in values}
        values |= {name: random_weight(rng, name, one.shape) for name, one in layer.items()}
    for name, one in values.items():
        found, decoded = stored(name, one, kind, rng)
        tensors |= found
        twin[name] = f32(decoded)
    write(both[0], tensors, replace(kind, case=case))
    write_safetensors(both[1] / "model.safetensors", twin)
    return both


def write(folder: Path, tensors: dict[str, Stored], kind: Format) -> Path:
    """Write a folder of these tensors."""
    fields = kind.case.config | {"quantization_config": kind.fields}
    (folder / "config.json").write_text(json.dumps(fields))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_unpacked(folder: Path, twin: Path, kind: Format, matrix: str) -> np.ndarray:
    """Write a folder again with one matrix in float32, as the twin has it, and return its values.

    Args:
        matrix: name without `.weight`.
    """
    tensors, values = stored_tensors(folder), loaded(twin)[f"{matrix}.weight"]
    tensors = {key: one for key, one in tensors.items() if not key.startswith(f"{matrix}.")}
    tensors[f"{matrix}.weight"] = Stored("F32", values.shape, values.tobytes())
    write(folder, tensors, kind)
    return values
