"""Writer of checkpoints in the formats of DeepSeek-V4's releases, which shares no code with fd_dsa.

A tensor is quantised to bytes, and the bytes are decoded again one value at a time by the text of
the formats. So each folder has a twin with the same values in float32.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fd_dsa.distributed import Group
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.loader import load_weights, validate
from fd_dsa.models.registry import open_checkpoint, read_config
from tests.models.folders import Stored, bf16, f32, write_safetensors
from tests.models.published import V4_FLASH
from tests.v4_model.cases import CSA, HCA, WINDOW, Case, write_tokenizer

QUANTISATION: dict[str, Any] = V4_FLASH["quantization_config"]
FP8_WEIGHTS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj")
# several FP8 blocks in both directions, the last ones not full; layers of all kinds
CASE = Case(
    "quantised",
    {
        "hidden_size": 160,
        "moe_intermediate_size": 64,
        "q_lora_rank": 136,
        "num_hidden_layers": 4,
        "layer_types": [WINDOW, CSA, HCA, CSA],
        "num_hash_layers": 1,
        "vocab_size": 96,
    },
    seed=21,
)


@dataclass(frozen=True)
class Release:
    """Formats of one release.

    Attributes:
        experts: "fp4" or "fp8".
        float_scales: True if FP8 scales are float32 and no powers of two.
    """

    experts: str = "fp4"
    float_scales: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of config.json that name the formats."""
        section = QUANTISATION | ({"scale_fmt": "float"} if self.float_scales else {})
        return {"quantization_config": section} | (
            {"expert_dtype": "fp4"} if self.experts == "fp4" else {}
        )


FP4 = Release()


def e2m1(code: int) -> float:
    """Value of a 4-bit code: sign, two bits of exponent, one bit of fraction."""
    sign, exponent, fraction = code >> 3, (code >> 1) & 3, code & 1
    size = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def e4m3(code: int) -> float:
    """Value of an 8-bit code: sign, four bits of exponent, three bits of fraction."""
    sign, exponent, fraction = code >> 7, (code >> 3) & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    size = fraction / 512 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def e8m0(code: int) -> float:
    """Value of a scale."""
    return math.nan if code == 255 else 2.0 ** (code - 127)


E2M1 = np.array([e2m1(code) for code in range(16)])
E4M3 = np.array([e4m3(code) for code in range(256)])
E8M0 = np.array([e8m0(code) for code in range(256)])


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Code of the nearest entry of a table, for each value."""
    _, codes = np.unique(table[~np.isnan(table)], return_index=True)
    entries = table[codes]
    above = np.searchsorted((entries[1:] + entries[:-1]) / 2, values)
    return codes[above].astype(np.uint8)


def exponent_of(largest: np.ndarray, limit: float) -> np.ndarray:
    """e8m0 code of the smallest power of two with which `largest` fits under a limit."""
    exponent = np.ceil(np.log2(np.maximum(largest, 1e-30) / limit))
    return (exponent + 127).astype(np.uint8)


def quantise_fp4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes uint8 [out, in / 2] and scale codes uint8 [out, in / 32]."""
    groups = values.reshape(len(values), -1, 32).astype(np.float64)
    scales = exponent_of(np.abs(groups).max(axis=2), 6.0)
    codes = nearest(groups / E8M0[scales][..., None], E2M1).reshape(len(values), -1)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scales


def decode_fp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [out, in]."""
    found = np.empty((len(packed), 2 * packed.shape[1]))
    found[:, 0::2], found[:, 1::2] = E2M1[packed & 15], E2M1[packed >> 4]
    return (found * np.repeat(E8M0[scales], 32, axis=1)).astype(np.float32)


def spread_blocks(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale for each value of blocks of 128 x 128."""
    return np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)[: shape[0], : shape[1]]


def quantise_fp8(values: np.ndarray, *, float_scales: bool) -> tuple[np.ndarray, Stored]:
    """Codes uint8 [out, in], and the scales as stored."""
    rows, columns = (-(-extent // 128) for extent in values.shape)
    largest = np.empty((rows, columns))
    for i, j in np.ndindex(rows, columns):
        block = values[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        largest[i, j] = np.abs(block).max()
    if float_scales:
        stored = f32(largest / 448)
    else:
        codes = exponent_of(largest, 448.0)
        stored = Stored("F8_E8M0", codes.shape, codes.tobytes())
    wide = spread_blocks(scales_of(stored).astype(np.float64), values.shape)
    return nearest(values.astype(np.float64) / wide, E4M3), stored


def scales_of(stored: Stored) -> np.ndarray:
    """Values of stored scales, float32."""
    if stored.dtype == "F8_E8M0":
        found = E8M0[np.frombuffer(stored.data, np.uint8)].astype(np.float32)
    else:
        found = np.frombuffer(stored.data, "<f4")
    return found.reshape(stored.shape)


def decode_fp8(codes: np.ndarray, scales: Stored) -> np.ndarray:
    """float32 [out, in], each product rounded once."""
    return E4M3[codes].astype(np.float32) * spread_blocks(scales_of(scales), codes.shape)


def quantised(name: str, values: np.ndarray, release: Release) -> tuple[dict[str, Stored], Any]:
    """A tensor as a release stores it, its scales after it, and its values in float32."""
    part = name.split(".")[-2] if name.endswith(".weight") else ""
    scale_name = f"{name.removesuffix('.weight')}.scale"
    if ".experts." in name and release.experts == "fp4":
        packed, codes = quantise_fp4(values)
        scales = Stored("F8_E8M0", codes.shape, codes.tobytes())
        stored = {name: Stored("I8", packed.shape, packed.tobytes()), scale_name: scales}
        return stored, decode_fp4(packed, codes)
    if part in FP8_WEIGHTS and "compressor" not in name:
        codes, scales = quantise_fp8(values, float_scales=release.float_scales)
        stored = {name: Stored("F8_E4M3", codes.shape, codes.tobytes()), scale_name: scales}
        return stored, decode_fp8(codes, scales)
    if values.dtype == np.int64:
        return {name: Stored("I64", values.shape, values.tobytes())}, values
    if part and part != "fn":
        one = bf16(values)
        bits = np.frombuffer(one.data, "<u2").astype(np.uint32) << 16
        return {name: one}, bits.view(np.float32).reshape(values.shape)
    return {name: f32(values)}, values


def write_pair(folder: Path, release: Release, case: Case = CASE) -> tuple[Path, Path]:
    """Write a folder in the formats of a release and its twin in float32, with tokenizers."""
    both = folder / "quantised", folder / "twin"
    write_tokenizer(case.write(both[0], "deepseek"))
    shutil.copytree(both[0], both[1], ignore=shutil.ignore_patterns("*.safetensors"))
    values = load_file(both[0] / "model.safetensors")
    stored: dict[str, Stored] = {}
    twin: dict[str, Stored] = {}
    for name, array in values.items():
        tensors, decoded = quantised(name, array, release)
        stored |= tensors
        dtype = "I64" if decoded.dtype == np.int64 else "F32"
        twin[name] = Stored(dtype, decoded.shape, decoded.tobytes())
    write_safetensors(both[0] / "model.safetensors", stored)
    write_safetensors(both[1] / "model.safetensors", twin)
    (both[0] / "config.json").write_text(json.dumps(case.config | release.fields))
    return both


def loaded(folder: Path, group: Group | None = None) -> dict[str, np.ndarray]:
    """Every tensor, or a rank's part of it, as the loader hands it over."""
    config, found = read_config(folder), {}

    def keep(name: str) -> Any:
        return lambda source: found.update(
            {name: source.ids() if name.endswith("tid2eid") else source.float32().copy()}
        )

    with open_checkpoint(config, folder) as checkpoint:
        validate(checkpoint, config)
        loaders = {name: keep(name) for name in expected_tensors(config)}
        load_weights(checkpoint, config, loaders, group=group)
    return found


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's file."""
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    return {
        name: Stored(one["dtype"], tuple(one["shape"]), data[start:][slice(*one["data_offsets"])])
        for name, one in header.items()
    }


def written(folder: Path, tensors: dict[str, Stored], release: Release = FP4) -> Path:
    """A folder of these tensors."""
    fields = CASE.config | release.fields
    (folder / "config.json").write_text(json.dumps(fields))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder
