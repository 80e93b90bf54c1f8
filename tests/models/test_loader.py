"""Checkpoint against configuration: what is missing, too much or of another shape; delivery."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import CheckpointError
from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.loader import fp8_tensors as fp8_names
from fd_dsa.models.loader import load_weights, validate
from fd_dsa.models.mla import down_projections
from fd_dsa.models.registry import config_from_dict, read_config
from fd_dsa.models.sources import SourceTensor, WeightLoader
from tests.models.folders import (
    SCALE_SUFFIX,
    TINY,
    TINY_FP8,
    TINY_GLM,
    Stored,
    bf16,
    f8,
    f16,
    f32,
    random_tensors,
    write_folder,
    write_shards,
)

EMBEDDING = "model.embed_tokens.weight"
Q_A = "model.layers.0.self_attn.q_a_proj.weight"
Q_B = "model.layers.0.self_attn.q_b_proj.weight"
KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
WEIGHTS_PROJ = "model.layers.0.self_attn.indexer.weights_proj.weight"


def check(folder: Path) -> None:
    validate(Checkpoint.open(folder), read_config(folder))


def refusal(folder: Path, fields: dict[str, Any], tensors: dict[str, Stored]) -> str:
    """The one-line message with which a folder of these tensors is refused."""
    write_folder(folder, fields, tensors)
    with pytest.raises(CheckpointError) as caught:
        check(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(folder: Path) -> dict[str, np.ndarray]:
    """All tensors as the loaders get them, each of which must come once."""
    loaded: dict[str, np.ndarray] = {}

    def loader(name: str) -> WeightLoader:
        def take(source: SourceTensor) -> None:
            assert name not in loaded
            loaded[name] = source.float32().copy()

        return take

    config = read_config(folder)
    names = expected_tensors(config)
    with Checkpoint.open(folder) as checkpoint:
        validate(checkpoint, config)
        load_weights(checkpoint, config, {name: loader(name) for name in names})
    assert loaded.keys() == names.keys()
    return loaded


def fp8_tensors(seed: int = 0) -> tuple[dict[str, Stored], dict[str, np.ndarray]]:
    """Tensors of TINY_FP8 as a release stores them, and the values they stand for."""
    rng = np.random.default_rng(seed)
    stored: dict[str, Stored] = {}
    values: dict[str, np.ndarray] = {}
    for name, tensor in expected_tensors(config_from_dict(TINY_FP8)).items():
        if not tensor.quantisable:
            stored[name] = f32(rng.standard_normal(tensor.shape))
            values[name] = np.frombuffer(stored[name].data, "<f4").reshape(tensor.shape)
            continue
        codes = rng.integers(56, 72, tensor.shape)
        rows, columns = tensor.shape
        scales = np.exp2(rng.integers(-4, 4, (-(-rows // 128), -(-columns // 128))))
        stored[name], stored[name + SCALE_SUFFIX] = f8(codes), f32(scales)
        # codes 56 ... 71 are 1, 1.125 ... 1.875, 2, 2.25 ... 3.75
        exact = (1 + (codes & 7) / 8) * np.where(codes < 64, 1, 2)
        exact *= scales[np.arange(rows)[:, None] // 128, np.arange(columns)[None] // 128]
        values[name] = exact.astype(np.float32)
    return stored, values


def test_names_and_shapes_of_the_releases() -> None:
    v32 = expected_tensors(config_from_dict({"model_type": "deepseek_v32"}))
    layer = "model.layers.60."
    shapes = {
        "self_attn.q_b_proj.weight": (24576, 1536),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "self_attn.kv_b_proj.weight": (32768, 512),
        "self_attn.o_proj.weight": (7168, 16384),
        "self_attn.indexer.wq_b.weight": (8192, 1536),
        "self_attn.indexer.wk.weight": (128, 7168),
        "self_attn.indexer.k_norm.bias": (128,),
        "self_attn.indexer.weights_proj.weight": (64, 7168),
        "mlp.gate.weight": (256, 7168),
        "mlp.gate.e_score_correction_bias": (256,),
        "mlp.experts.255.down_proj.weight": (7168, 2048),
        "mlp.shared_experts.up_proj.weight": (2048, 7168),
    }
    assert {name: v32[layer + name].shape for name in shapes} == shapes
    assert v32["model.layers.2.mlp.down_proj.weight"].shape == (7168, 18432)
    assert "model.layers.3.mlp.down_proj.weight" not in v32
    assert not v32[layer + "self_attn.indexer.weights_proj.weight"].quantisable
    assert v32[layer + "self_attn.indexer.wk.weight"].quantisable
    # two shared experts are one wide MLP
    tiny = expected_tensors(config_from_dict(TINY))
    assert tiny["model.layers.1.mlp.shared_experts.gate_proj.weight"].shape == (16, 32)
    glm = expected_tensors(config_from_dict({"model_type": "glm_moe_dsa"}))
    assert glm["model.layers.9.self_attn.kv_b_proj.weight"].shape == (28672, 512)
    assert glm["model.layers.9.self_attn.indexer.wq_b.weight"].shape == (4096, 2048)


def test_shared_layers_have_no_indexer_and_biases_follow_the_flag() -> None:
    names = expected_tensors(config_from_dict(TINY_GLM)).keys()
    with_indexer = {name.split(".")[2] for name in names if ".indexer." in name}
    assert with_indexer == {"0", "2"}
    biases = {name.split(".")[-2] for name in names if name.startswith("model.layers.1.self_attn")}
    assert {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"} <= biases
    found = {name.split(".")[-2] for name in names if name.endswith("_proj.bias")}
    found |= {name.split(".")[-2] for name in names if name.endswith("_mqa.bias")}
    assert found == {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"}


@pytest.mark.parametrize("fields", [TINY, TINY_GLM], ids=["v32", "glm"])
@pytest.mark.parametrize("num_shards", [0, 3])
def test_float32_values_arrive(tmp_path: Path, fields: dict[str, Any], num_shards: int) -> None:
    tensors = random_tensors(fields)
    write_folder(tmp_path, fields, tensors)
    if num_shards:
        (tmp_path / "model.safetensors").unlink()
        write_shards(tmp_path, tensors, num_shards)
    for name, values in load(tmp_path).items():
        assert values.tobytes() == tensors[name].data
        assert values.shape == tensors[name].shape


def test_fp8_values_arrive_beside_matrices_in_half_precision(tmp_path: Path) -> None:
    stored, expected = fp8_tensors()
    for name, half in ((Q_A, bf16), (Q_B, f16)):
        del stored[name + SCALE_SUFFIX]
        stored[name] = half(expected[name])
    write_folder(tmp_path, TINY_FP8, stored)
    assert stored[KV_A + SCALE_SUFFIX].shape == (2, 2)
    for name, values in load(tmp_path).items():
        np.testing.assert_array_equal(values, expected[name])


def test_later_layers_and_inv_freq_are_skipped_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = f32(np.ones((2, 2)))
    more = {
        "model.layers.3.eh_proj.weight": extra,
        "model.layers.3.self_attn.q_a_proj.weight": extra,
        "model.layers.10.enorm.weight": extra,
        "model.layers.0.self_attn.rotary_emb.inv_freq": extra,
        "model.rotary_emb.inv_freq": extra,
    }
    with caplog.at_level(logging.INFO):
        load(write_folder(tmp_path, TINY))
        assert not caplog.records
        load(write_folder(tmp_path, TINY, random_tensors(TINY) | more))
    (record,) = caplog.records
    assert "5 tensors skipped" in record.getMessage()


def test_a_layer_too_many_is_refused_unless_it_predicts_tokens(tmp_path: Path) -> None:
    stored, last = random_tensors(TINY), "model.layers.2."
    ends = [name.removeprefix(last) for name in stored if name.startswith(last)]
    copies = {f"model.layers.3.{end}": stored[last + end] for end in ends}
    write_folder(tmp_path, TINY, stored | copies)
    with pytest.raises(CheckpointError, match=r"layers\.3.*unexpected.*; num_hidden_layers is 3"):
        load(tmp_path)


def test_indexers_of_layers_that_share_one_are_skipped_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = random_tensors(TINY_GLM)
    first, shared = "model.layers.0.self_attn.indexer.", "model.layers.1.self_attn.indexer."
    copies = {
        name.replace(first, shared): one for name, one in stored.items() if name.startswith(first)
    }
    wk = f"{shared}wk.weight"
    rows, columns = stored[f"{first}wk.weight"].shape
    copies[wk] = f8(np.zeros((rows, columns)))
    copies[wk + SCALE_SUFFIX] = f32(np.ones((1, 1)))
    write_folder(tmp_path, TINY_GLM, stored | copies)
    with caplog.at_level(logging.INFO):
        loaded = load(tmp_path)
    assert not copies.keys() & loaded.keys()
    (record,) = caplog.records
    assert f"{len(copies)} indexer tensors skipped" in record.getMessage()


def test_fp8_keys_of_a_shared_indexer_join_no_projection(tmp_path: Path) -> None:
    """A device joins an FP8 `wk` with the first GEMM of a layer, but a shared layer has none."""
    widths = {"q_lora_rank": 128, "index_head_dim": 128, "attention_bias": False}
    fields = TINY_GLM | widths | {"quantization_config": TINY_FP8["quantization_config"]}
    prefix, stored = "model.layers.1.self_attn.", random_tensors(fields)
    rows = {"q_a_proj": 128, "indexer.wk": 128, "kv_a_proj_with_mqa": 24}
    for name, count in rows.items():
        stored[f"{prefix}{name}.weight"] = f8(np.zeros((count, 32)))
        stored[f"{prefix}{name}.weight{SCALE_SUFFIX}"] = f32(np.ones((1, 1)))
    config = read_config(write_folder(tmp_path, fields, stored))
    with Checkpoint.open(tmp_path) as checkpoint:
        validate(checkpoint, config)
        parts = down_projections(config, prefix, fp8_names(checkpoint, config))
    assert [name.split(".")[-2] for name in parts] == ["q_a_proj", "kv_a_proj_with_mqa"]


def without(name: str, tensors: dict[str, Stored]) -> dict[str, Stored]:
    return {other: tensor for other, tensor in tensors.items() if other != name}


def of_dtype(dtype: str, width: int) -> Stored:
    """The projection of the first layer in another type."""
    return Stored(dtype, (12, 32), bytes(12 * 32 * width))


PLAIN, FP8 = random_tensors(TINY), fp8_tensors()[0]
ONES = f32(np.ones((2, 3)))
TIED = TINY | {"tie_word_embeddings": True}
FLOATS = "expected dtype F32 or BF16 or F16"
OTHER_PART = "model.layers.0.self_attn.indexer.q_norm.weight"
# what config.json says, what the file holds, and what the message says
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Stored], str]] = {
    "missing": (TINY, without(Q_A, PLAIN), f"{Q_A!r}: missing, expected shape [12, 32]"),
    "unexpected": (
        TINY,
        PLAIN | {"x": ONES},
        "safetensors: tensor 'x': unexpected, found F32 [2, 3]",
    ),
    "part of an indexer that no model has": (
        TINY_GLM,
        random_tensors(TINY_GLM) | {OTHER_PART: ONES},
        f"{OTHER_PART!r}: unexpected",
    ),
    "scales of a plain weight": (
        TINY,
        PLAIN | {Q_A + SCALE_SUFFIX: ONES},
        f"{Q_A + SCALE_SUFFIX!r}: unexpected",
    ),
    "shape": (
        TINY,
        PLAIN | {Q_A: f32(np.ones((32, 12)))},
        f"model.safetensors: tensor {Q_A!r}: expected shape [12, 32], found [32, 12]",
    ),
    "vocabulary": (
        TINY,
        random_tensors(TINY | {"vocab_size": 49}),
        "expected shape [50, 32] (vocab_size is 50), found [49, 32]",
    ),
    "F64": (TINY, PLAIN | {Q_A: of_dtype("F64", 8)}, f"{FLOATS} or F8_E4M3, found F64"),
    "I32": (TINY, PLAIN | {Q_A: of_dtype("I32", 4)}, f"{FLOATS} or F8_E4M3, found I32"),
    "F8_E5M2": (TINY, PLAIN | {Q_A: of_dtype("F8_E5M2", 1)}, "found F8_E5M2"),
    "FP8 without quantization_config": (
        TINY,
        PLAIN | {Q_A: f8(np.zeros((12, 32)))},
        f"{Q_A!r}: found dtype F8_E4M3, but config.json names no blocks of FP8 weights",
    ),
    "FP8 without scales": (
        TINY_FP8,
        without(KV_A + SCALE_SUFFIX, FP8),
        f"{KV_A + SCALE_SUFFIX!r} are missing, expected shape [2, 2]",
    ),
    "FP8 with other scales": (
        TINY_FP8,
        FP8 | {KV_A + SCALE_SUFFIX: f32(np.ones((1, 2)))},
        f"tensor {KV_A + SCALE_SUFFIX!r}: expected F32 or BF16 or F16 or F8_E8M0 [2, 2], found F32 "
        "[1, 2]",
    ),
    "FP8 where no release has it": (
        TINY_FP8,
        FP8
        | {WEIGHTS_PROJ: f8(np.zeros((3, 160))), WEIGHTS_PROJ + SCALE_SUFFIX: f32(np.ones((1, 2)))},
        f"{WEIGHTS_PROJ!r}: {FLOATS}, found F8_E4M3",
    ),
    "a tied head of its own": (
        TIED,
        random_tensors(TIED) | {"lm_head.weight": f32(np.ones((50, 32)))},
        f"'lm_head.weight': expected the values of {EMBEDDING!r}",
    ),
}


@pytest.mark.parametrize(("fields", "tensors", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, fields: dict[str, Any], tensors: dict[str, Stored], text: str
) -> None:
    message = refusal(tmp_path, fields, tensors)
    assert str(tmp_path) in message
    assert text in message


def test_many_problems_make_one_readable_line(tmp_path: Path) -> None:
    write_folder(tmp_path, TINY, {"x": f32(np.ones(1))})
    with pytest.raises(CheckpointError) as caught:
        check(tmp_path)
    count = len(expected_tensors(config_from_dict(TINY)))
    assert str(caught.value).endswith(f"; and {count + 1 - 3} more")
    assert str(caught.value).count("missing") == 3


@pytest.mark.parametrize("stores_head", [False, True])
def test_tied_head(tmp_path: Path, stores_head: bool) -> None:
    fields = TINY | {"tie_word_embeddings": True}
    tensors = random_tensors(fields)
    assert "lm_head.weight" not in tensors
    more = {"lm_head.weight": tensors[EMBEDDING]} if stores_head else {}
    assert load(write_folder(tmp_path, fields, tensors | more)).keys() == tensors.keys()


def test_progress_reaches_the_total_and_loaders_are_those_of_the_model(tmp_path: Path) -> None:
    stored, _ = fp8_tensors()
    config = read_config(write_folder(tmp_path, TINY_FP8, stored))
    calls: list[tuple[int, int]] = []
    loaders: dict[str, WeightLoader] = {
        name: lambda source: None for name in expected_tensors(config)
    }
    load_weights(Checkpoint.open(tmp_path), config, loaders, lambda *args: calls.append(args))
    total = sum(len(stored[name].data) for name in loaders)
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert len(calls) == len(loaders) + 1
    assert calls == sorted(calls)

    for others in (loaders | {"odd": loaders[Q_A]}, {Q_A: loaders[Q_A]}):
        with pytest.raises(ValueError, match="is only in one"):
            load_weights(Checkpoint.open(tmp_path), config, others)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
WK = "model.layers.0.self_attn.indexer.wk.weight"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [EXPERT + SCALE_SUFFIX, WK + SCALE_SUFFIX, BIAS, WEIGHTS_PROJ])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    """A NaN in them changes choices of experts or keys, and no logit shows it."""
    stored, _ = fp8_tensors()
    numbers = np.frombuffer(stored[name].data, "<f4").copy()
    numbers[-1] = value
    stored[name] = f32(numbers.reshape(stored[name].shape))
    write_folder(tmp_path, TINY_FP8, stored)
    place = [extent - 1 for extent in stored[name].shape]
    start = f"{tmp_path / 'model.safetensors'}: tensor {name!r}: got {value:g} at {place}, allowed"
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{start}: finite numbers; ")


@pytest.mark.parametrize(
    ("change", "found"),
    [(None, "missing, expected shape [8, 32]"), (f32(np.ones((2, 2))), "found [2, 2]")],
    ids=["gone", "another shape"],
)
def test_a_folder_that_changes_after_its_check_is_refused(
    tmp_path: Path, change: Stored | None, found: str
) -> None:
    stored = random_tensors(TINY)
    config = read_config(write_folder(tmp_path, TINY, stored))
    check(tmp_path)
    del stored[EXPERT]
    write_folder(tmp_path, TINY, stored | ({} if change is None else {EXPERT: change}))
    loaders: dict[str, WeightLoader] = dict.fromkeys(expected_tensors(config), lambda _: None)
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError) as caught:
        load_weights(checkpoint, config, loaders)
    assert f"tensor {EXPERT!r}" in str(caught.value) and found in str(caught.value)
    assert str(caught.value).endswith("; the folder changed during the start: start again")
