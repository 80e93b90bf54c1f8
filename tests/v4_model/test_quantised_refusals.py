"""Refusals of quantised checkpoints: each names the tensor or the field, the value and the rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import CheckpointError, ConfigError
from fd_dsa.models.registry import config_from_dict
from tests.models.folders import Stored, f32
from tests.models.published import V4_FLASH
from tests.v4_model.ours import load_model
from tests.v4_model.quantised import (
    FP4,
    QUANTISATION,
    Release,
    loaded,
    stored_tensors,
    write_pair,
    written,
)

W1, WQ_A = "layers.1.ffn.experts.3.w1", "layers.1.attn.wq_a"
BYTES = {"I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F32": 4, "F16": 2}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with FP4 experts and its twin."""
    return write_pair(tmp_path_factory.mktemp("released"), FP4)


def zeros(dtype: str, *shape: int) -> Stored:
    """A tensor of zero bytes."""
    return Stored(dtype, shape, bytes(BYTES[dtype] * int(np.prod(shape))))


DAMAGED: dict[str, tuple[dict[str, Stored | None], str]] = {
    "codes of another shape": (
        {f"{W1}.weight": zeros("I8", 64, 160)},
        f"tensor '{W1}.weight': expected shape [64, 80], found [64, 160]",
    ),
    "unsigned codes": (
        {f"{W1}.weight": zeros("U8", 64, 80)},
        f"'{W1}.weight': expected dtype F32 or BF16 or F16 or I8, found U8",
    ),
    "an expert in FP8": (
        {f"{W1}.weight": zeros("F8_E4M3", 64, 160), f"{W1}.scale": zeros("F8_E8M0", 1, 2)},
        f"'{W1}.weight': expected dtype F32 or BF16 or F16 or I8, found F8_E4M3",
    ),
    "no scales of FP4": (
        {f"{W1}.scale": None},
        f"'{W1}.weight': its scales '{W1}.scale' are missing, expected shape [64, 5]",
    ),
    "scales of FP4 for 128 values": (
        {f"{W1}.scale": zeros("F8_E8M0", 64, 2)},
        f"'{W1}.scale': expected F8_E8M0 [64, 5], found F8_E8M0 [64, 2]",
    ),
    "float scales of FP4": (
        {f"{W1}.scale": zeros("F32", 64, 5)},
        f"'{W1}.scale': expected F8_E8M0 [64, 5], found F32 [64, 5]",
    ),
    "no scales of FP8": (
        {f"{WQ_A}.scale": None},
        f"'{WQ_A}.weight': its scales '{WQ_A}.scale' are missing, expected shape [2, 2]",
    ),
    "scales of FP8 for rows": (
        {f"{WQ_A}.scale": zeros("F8_E8M0", 136, 2)},
        f"'{WQ_A}.scale': expected F32 or BF16 or F16 or F8_E8M0 [2, 2], found F8_E8M0 [136, 2]",
    ),
    "attention in FP4": (
        {f"{WQ_A}.weight": zeros("I8", 136, 80)},
        f"'{WQ_A}.weight': expected dtype F32 or BF16 or F16 or F8_E4M3, found I8",
    ),
    "a compressor in FP8": (
        {"layers.1.attn.compressor.wkv.weight": zeros("F8_E4M3", 64, 160)},
        "'layers.1.attn.compressor.wkv.weight': expected dtype F32 or BF16 or F16, found F8_E4M3",
    ),
    "scales of a plain weight": (
        {"layers.1.ffn.gate.scale": zeros("F8_E8M0", 1, 2)},
        "tensor 'layers.1.ffn.gate.scale': unexpected, found F8_E8M0 [1, 2]",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_tensors(kind: str, released: tuple[Path, Path], tmp_path: Path) -> None:
    changes, text = DAMAGED[kind]
    tensors = stored_tensors(released[0]) | changes
    folder = written(tmp_path, {name: one for name, one in tensors.items() if one is not None})
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert text in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fp4_without_the_field_is_refused(released: tuple[Path, Path], tmp_path: Path) -> None:
    folder = written(tmp_path, stored_tensors(released[0]), Release(experts="fp8"))
    with pytest.raises(CheckpointError, match=r"found I8 \(FP4 needs expert_dtype fp4 in config"):
        load_model(folder)


@pytest.mark.parametrize("name", [W1, WQ_A])
def test_scales_that_are_nan(name: str, released: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = stored_tensors(released[0])
    scales = bytearray(tensors[f"{name}.scale"].data)
    scales[3] = 255
    place = [0, 3] if name == W1 else [1, 1]
    changed = Stored("F8_E8M0", tensors[f"{name}.scale"].shape, bytes(scales))
    folder = written(tmp_path, tensors | {f"{name}.scale": changed})
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    text = f"'{name}.scale': got code 255 (NaN) at {place}, allowed: codes 0 to 254"
    assert text in str(caught.value)


def test_a_float_expert_beside_fp4_ones(released: tuple[Path, Path], tmp_path: Path) -> None:
    """The dtype of a tensor decides, so a tensor that was dequantised is read as it is."""
    tensors = stored_tensors(released[0])
    values = loaded(released[1])[f"model.{W1}.weight"]
    del tensors[f"{W1}.scale"]
    folder = written(tmp_path, tensors | {f"{W1}.weight": f32(values)})
    np.testing.assert_array_equal(loaded(folder)[f"model.{W1}.weight"], values)


def test_fields_of_the_releases() -> None:
    config = config_from_dict(V4_FLASH)
    assert (config.expert_dtype, config.weight_block_size, config.round_scales) == (
        *("fp4", (128, 128)),
        True,
    )
    # as transformers writes them
    section = {"expert_dtype": None, "quantization_config": QUANTISATION | {"expert_dtype": "fp4"}}
    assert config_from_dict(V4_FLASH | section) == config
    base = {"expert_dtype": None, "quantization_config": QUANTISATION | {"scale_fmt": "float"}}
    config = config_from_dict(V4_FLASH | base)
    assert (config.expert_dtype, config.round_scales) == (None, False)


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"expert_dtype": "nvfp4"}, "expert_dtype: got 'nvfp4', allowed: None, 'fp4', 'f"),
    "method": (
        {"quantization_config": QUANTISATION | {"quant_method": "modelopt"}},
        "quantization_config.quant_method: got 'modelopt', allowed: 'fp8'",
    ),
    "scales": (
        {"quantization_config": QUANTISATION | {"scale_fmt": "e5m2"}},
        "quantization_config.scale_fmt: got 'e5m2', allowed: None, 'ue8m0', 'float'",
    ),
    "codes": (
        {"quantization_config": QUANTISATION | {"fmt": "e5m2"}},
        "quantization_config.fmt: got 'e5m2', allowed: 'e4m3'",
    ),
    "static": (
        {"quantization_config": QUANTISATION | {"activation_scheme": "static"}},
        "quantization_config.activation_scheme: got 'static', allowed: 'dynamic'",
    ),
    "two types of experts": (
        {"quantization_config": QUANTISATION | {"expert_dtype": "fp8"}},
        "quantization_config.expert_dtype: got 'fp8', allowed: 'fp4', as at the top of the file",
    ),
    "groups that are cut": (
        {"moe_intermediate_size": 2000},
        "moe_intermediate_size: got 2000, allowed: a multiple of 32",
    ),
    "unknown": (
        {"quantization_config": QUANTISATION | {"strange": 1}},
        "quantization_config.strange: got 1",
    ),
    "images": ({"vision_dim": 1024}, "vision_dim: got 1024, allowed: no fields of a vision model"),
    "images in a section": ({"vision_config": {"depth": 2}}, "DeepSeek-V4 with images is not serv"),
    "a family with images": ({"model_type": "deepseek_v4_vision"}, "not served yet: images"),
    "V4.1": ({"model_type": "deepseek_v41"}, "model_type: got 'deepseek_v41'"),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_that_are_refused(kind: str) -> None:
    changes, text = FIELDS[kind]
    with pytest.raises(ConfigError) as caught:
        config_from_dict(V4_FLASH | changes)
    assert text in str(caught.value) and "\n" not in str(caught.value)
