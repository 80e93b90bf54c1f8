"""Refusals of checkpoints in four bits: each names tensor or field, the value and the rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import CheckpointError, ConfigError
from fd_dsa.models.loader import validate
from fd_dsa.models.registry import config_from_dict, open_checkpoint, read_config
from tests.models.folders import Stored
from tests.models.four_bits import (
    AUTO_ROUND,
    AWQ,
    FORMATS,
    GPTQ,
    INT4_GROUP,
    MODELOPT,
    NVFP4_GROUP,
    compressed_fields,
    group,
    write,
    write_pair,
)
from tests.models.published import V32
from tests.v4_model.quantised import loaded, stored_tensors

UP = "model.layers.1.mlp.experts.3.up_proj"
BYTES = {"I8": 1, "U8": 1, "F8_E4M3": 1, "I32": 4, "F32": 4, "F16": 2}


def zeros(dtype: str, *shape: int) -> Stored:
    """A tensor of zero bytes."""
    return Stored(dtype, shape, bytes(BYTES[dtype] * int(np.prod(shape))))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound folder of each format that is damaged."""
    names = {fault[0] for fault in (*SHAPES.values(), *VALUES.values())}
    return {name: write_pair(tmp_path_factory.mktemp("kind"), FORMATS[name])[0] for name in names}


NVFP4, RED_HAT = "nvfp4 of modelopt", "nvfp4 of compressed-tensors"
ZERO_POINTS = "int4 of compressed-tensors, zero points, groups of 32"
# format, changed tensors of the up-projection [128, 256] of an expert, message
SHAPES: dict[str, tuple[str, dict[str, Stored | None], str]] = {
    "no scales": (
        *(NVFP4, {"weight_scale": None}),
        f"NVFP4 (modelopt): tensor '{UP}.weight_scale' is missing, expected F8_E4M3 [128, 16]",
    ),
    "no global scale": (
        *(NVFP4, {"weight_scale_2": None}),
        f"tensor '{UP}.weight_scale_2' is missing, expected F32 []",
    ),
    "scales of 32 values": (
        *(NVFP4, {"weight_scale": zeros("F8_E4M3", 128, 8)}),
        f"'{UP}.weight_scale': expected F8_E4M3 [128, 16], found F8_E4M3 [128, 8]",
    ),
    "scales in powers of two": (
        *(RED_HAT, {"weight_scale": Stored("F8_E8M0", (128, 16), bytes(2048))}),
        f"'{UP}.weight_scale': expected F8_E4M3 [128, 16], found F8_E8M0 [128, 16]",
    ),
    "a global scale for each row": (
        *(RED_HAT, {"weight_global_scale": zeros("F32", 128)}),
        f"'{UP}.weight_global_scale': expected F32 [], found F32 [128]",
    ),
    "codes of another shape": (
        *("awq", {"qweight": zeros("I32", 32, 128)}),
        f"'{UP}.qweight': expected I32 [256, 16], found I32 [32, 128]",
    ),
    "eight bits in one module": (
        *("gptq", {"qweight": zeros("I32", 64, 128)}),
        f"'{UP}.qweight': expected I32 [32, 128], found I32 [64, 128]",
    ),
    "no zero points": (
        *("awq", {"qzeros": None}),
        f"tensor '{UP}.qzeros' is missing, expected I32 [2, 16]",
    ),
    "no act-order": (
        *("gptq, act-order", {"g_idx": None}),
        f"tensor '{UP}.g_idx' is missing, expected I32 [256]",
    ),
    "act-order of another length": (
        *("gptq", {"g_idx": zeros("I32", 128)}),
        f"'{UP}.g_idx': expected I32 [256], found I32 [128]",
    ),
    "scales of other groups": (
        *("gptq", {"scales": zeros("F16", 4, 128)}),
        f"'{UP}.scales': expected F32 or BF16 or F16 [2, 128], found F16 [4, 128]",
    ),
    "unexpected zero points": (
        *("int4 of compressed-tensors", {"weight_zero_point": zeros("I32", 16, 2)}),
        f"'{UP}.weight_zero_point': unexpected, config.json says symmetric weights",
    ),
    "zero points in bytes": (
        *(ZERO_POINTS, {"weight_zero_point": zeros("I8", 128, 8)}),
        f"'{UP}.weight_zero_point': expected I32 [16, 8], found I8 [128, 8]",
    ),
    "scales of activations that rotate": (
        *("awq", {"pre_quant_scale": zeros("F16", 256)}),
        f"tensor '{UP}.pre_quant_scale': unexpected, found F16 [256]",
    ),
    "codes twice": (
        *("gptq", {"weight": zeros("F32", 128, 256)}),
        f"tensor '{UP}.qweight' is there twice, also as '{UP}.weight'",
    ),
    "other codes": (
        *("w4afp8", {"weight": zeros("U8", 128, 128)}),
        f"'{UP}.weight': expected dtype F32 or BF16 or F16 or F8_E4M3 or I8, found U8",
    ),
}


@pytest.mark.parametrize("fault", SHAPES)
def test_tensors_that_do_not_fit(fault: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name, changes, text = SHAPES[fault]
    tensors: dict[str, Stored | None] = dict(stored_tensors(folders[name]))
    tensors |= {f"{UP}.{end}": one for end, one in changes.items()}
    present = {key: one for key, one in tensors.items() if one is not None}
    folder = write(tmp_path, present, FORMATS[name])
    config = read_config(folder)
    with pytest.raises(CheckpointError) as caught, open_checkpoint(config, folder) as checkpoint:
        validate(checkpoint, config)
    assert text in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


# format, tensor of the up-projection, type and place of a value, the value, message
VALUES: dict[str, tuple[str, str, str, int, Any, str]] = {
    "NaN among scales": (
        *(NVFP4, "weight_scale", "u1", 19, 0x7F),
        "got nan at [1, 3], allowed: finite numbers",
    ),
    "NaN in float16": (
        *("gptq", "scales", "<f2", 130, np.nan),
        "got nan at [1, 2], allowed: finite numbers",
    ),
    "infinite scale": (
        *("awq", "scales", "<f2", 0, np.inf),
        "got inf at [0, 0], allowed: finite numbers",
    ),
    "a divisor of 0": (
        *(RED_HAT, "weight_global_scale", "<f4", 0, 0.0),
        "got 0 at [0], allowed: finite numbers above 0",
    ),
    "a NaN as the global scale": (
        *(NVFP4, "weight_scale_2", "<f4", 0, np.nan),
        "allowed: finite numbers",
    ),
    "a zero point of 16": (
        *("gptq", "qzeros", "<u4", 0, 0xFFFFFFFF),
        "got 16 at [0, 0], allowed: zero points up to 15",
    ),
    "symmetric with another zero point": (
        *("gptq, symmetric", "qzeros", "<u4", 1, 0x77777877),
        "got 9 at [10, 0], allowed: 8, the zero point of symmetric weights (config.json)",
    ),
    "a group that is not there": (
        *("gptq, act-order", "g_idx", "<i4", 7, 2),
        "got 2 at [7], allowed: groups 0 to 1",
    ),
    "a negative group": (
        *("gptq, act-order", "g_idx", "<i4", 7, -1),
        "got -1 at [7], allowed: groups 0 to 1",
    ),
}


@pytest.mark.parametrize("fault", VALUES)
def test_values_that_are_no_numbers(fault: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name, end, dtype, place, value, text = VALUES[fault]
    tensors = stored_tensors(folders[name])
    one = tensors[f"{UP}.{end}"]
    values = np.frombuffer(one.data, dtype).copy()
    values[place] = value
    tensors[f"{UP}.{end}"] = Stored(one.dtype, one.shape, values.tobytes())
    with pytest.raises(CheckpointError) as caught:
        loaded(write(tmp_path, tensors, FORMATS[name]))
    assert f"tensor '{UP}.{end}': got" in str(caught.value) and text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sizes", "group_size", "text"),
    [
        ("awq", {"moe_intermediate_size": 124}, 128, "got [124, 256], allowed: [out, in] with mul"),
        ("w4afp8", {}, 3, "got [128, 256], allowed: [out, in] with multiples of 1 and 6"),
    ],
)
def test_widths_that_are_cut(
    name: str,
    sizes: dict[str, int],
    group_size: int,
    text: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Words of eight values, and groups in whole bytes, do not fill the rows."""
    folder = write(tmp_path, stored_tensors(folders[name]), FORMATS[name])
    fields = json.loads((folder / "config.json").read_text()) | sizes
    fields["quantization_config"]["group_size"] = group_size
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError) as caught:
        loaded(folder)
    assert text in str(caught.value)


def changed(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Fields with changes."""
    return fields | changes


def int4(**weights: Any) -> dict[str, Any]:
    """compressed-tensors' INT4 with changed weights."""
    one = INT4_GROUP | {"weights": INT4_GROUP["weights"] | weights}
    return compressed_fields("pack-quantized", one)


OTHER = "vLLM or SGLang may serve it; fd_dsa serves the model's FP8 or bfloat16 release"
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "quant_method: got 'bitsandbytes', allowed: 'fp8', 'auto-round', 'awq', 'compressed-te",
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, OTHER),
    "AWQ of 8 bits": (changed(AWQ, bits=8), f"bits: got 8, allowed: 4; {OTHER}"),
    "AWQ of another layout": (changed(AWQ, version="gemv"), "version: got 'gemv', allowed: 'gemm'"),
    "AWQ without groups": ({"quant_method": "awq", "bits": 4}, "group_size: got None"),
    "GPTQ of 3 bits": (changed(GPTQ, bits=3), "bits: got 3, allowed: 4"),
    "groups of 0": (changed(GPTQ, group_size=0), "group_size: got 0, allowed: an integer of at"),
    "groups of 1.5": (changed(AWQ, group_size=1.5), "group_size: got 1.5, allowed: an integer"),
    "marlin": (
        changed(GPTQ, checkpoint_format="marlin"),
        "checkpoint_format: got 'marlin', allowed: 'gptq', 'gptq_v2'",
    ),
    "two formats": (
        changed(GPTQ, checkpoint_format="gptq", format="gptq_v2"),
        "format: got 'gptq_v2', allowed: 'gptq'; checkpoint_format says otherwise",
    ),
    "bits by module": (
        changed(GPTQ, dynamic={"-:.*gate.*": {}, "+:.*down.*": {"bits": 8}}),
        "dynamic: got {'+:.*down.*': {'bits': 8}, '-:.*gate.*': {}}, allowed: rules -:… that ex",
    ),
    "bits by layer": (
        changed(AUTO_ROUND, extra_config={"model.layers.3.mlp.down_proj": {"bits": 8}}),
        "extra_config.model.layers.3.mlp.down_proj: got {'bits': 8}, allowed: bits 4, 16 or 32",
    ),
    "auto-round of floats": (
        changed(AUTO_ROUND, data_type="mx_fp"),
        "data_type: got 'mx_fp', allowed: 'int'",
    ),
    "modelopt's FP8": (changed(MODELOPT, quant_algo="FP8"), "quant_algo: got 'FP8', allowed: 'NV"),
    "modelopt's layers": (
        changed(MODELOPT, quant_algo="MIXED_PRECISION", quantized_layers={}),
        "quant_algo: got 'MIXED_PRECISION', allowed: 'NVFP4'",
    ),
    "groups of 32": (changed(MODELOPT, group_size=32), "group_size: got 32, allowed: 16"),
    "a rotation": (
        changed(int4(), transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        "transform_config: got {'config_groups': {'u': {'type': 'hadamard'}}}, allowed: {}, None",
    ),
    "sparse": (changed(int4(), sparsity_config={"format": "dense"}), "sparsity_config: got {'form"),
    "no groups": (changed(int4(), config_groups={}), "config_groups: got {}, allowed: a group of"),
    "groups as a list": (changed(int4(), config_groups=[1]), "config_groups: got [1], allowed: an"),
    "a group without weights": (
        changed(int4(), config_groups={"group_0": {"targets": ["Linear"]}}),
        "config_groups.group_0: got {'targets': ['Linear']}, allowed: an object with weights",
    ),
    "whole bytes": (
        changed(int4(), format="int-quantized"),
        "quantization_config.format: got 'int-quantized', allowed: None, 'mixed-precision', 'nv",
    ),
    "eight bits": (
        int4(num_bits=8),
        "group_0.weights.type: got 'int of 8 bits, group, group_size 128, symmetric True', allow",
    ),
    "FP8 in channels": (
        compressed_fields("mixed-precision", NVFP4_GROUP, group(8, "float", "channel")),
        "group_1.weights.type: got 'float of 8 bits, channel, group_size None, symmetric True'",
    ),
    "two formats in four bits": (
        compressed_fields("mixed-precision", NVFP4_GROUP, INT4_GROUP),
        "config_groups.group_1.weights: got {",
    ),
    "act-order of compressed-tensors": (
        int4(actorder="group"),
        "weights.actorder: got 'group', allowed: None, 'weight', 'static'",
    ),
    "dynamic weights": (int4(dynamic=True), "weights.dynamic: got True, allowed: False"),
    "an unknown field": (int4(strange=1), "config_groups.group_0.weights.strange: got 1"),
    "an unknown field of AWQ": (changed(AWQ, strange=1), "quantization_config.strange: got 1"),
    "W4AFP8 of another format": (
        {"quant_method": "w4afp8", "fmt": "e5m2"},
        "quantization_config.fmt: got 'e5m2', allowed: 'e4m3'",
    ),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_that_are_refused(kind: str) -> None:
    fields, text = FIELDS[kind]
    with pytest.raises(ConfigError) as caught:
        config_from_dict(V32 | {"quantization_config": fields})
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_fields_that_are_served(name: str) -> None:
    """Published sizes with the fields of each format."""
    config = config_from_dict(V32 | {"quantization_config": FORMATS[name].fields})
    assert config.packing is not None
    assert (config.weight_block_size is not None) == (FORMATS[name].others != "bf16")
