"""Checkpoints in the formats of the releases: the same bits, logits and answers as float32."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa import SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.models import dequantize, sources
from fd_dsa.models.dequantize import dequantize_blocks, dequantize_groups, wide_blocks
from fd_dsa.ops.fp4 import E8M0_VALUES
from fd_dsa.startup.plan import make_plan
from tests.models.folders import Stored
from tests.v4_model import quantised
from tests.v4_model.ours import load_model, make_runner, prompt_logits
from tests.v4_model.quantised import (
    CASE,
    E2M1,
    E4M3,
    E8M0,
    FP4,
    Release,
    loaded,
    stored_tensors,
    write_pair,
    written,
)
from tests.v4_model.test_engine import engine_of, tokens_of
from tests.v4_model.test_parity import TOLERANCE
from tests.v4_model.test_wrong_builds import put_in

RELEASES = {
    "fp4 experts": FP4,
    "fp8 experts": Release(experts="fp8"),
    "base: fp8 experts, float scales": Release(experts="fp8", float_scales=True),
}


@pytest.fixture(scope="module", params=RELEASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A quantised folder and its twin."""
    return write_pair(tmp_path_factory.mktemp("pair"), RELEASES[request.param])


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with FP4 experts and its twin."""
    return write_pair(tmp_path_factory.mktemp("released"), FP4)


def test_bytes_worked_out_by_hand() -> None:
    """The writer's and the loader's reading of bytes, from the text of the formats."""
    # nibbles 1, 2: 0.5 and 1; nibbles 7, 15: 6 and -6; the first value is in the low bits
    packed = np.array([[0x21, 0xF7, *[0] * 14, 0x0A, *[0x80] * 15]], np.uint8)
    # 2^0 and 2^-3
    scales = np.array([[127, 124]], np.uint8)
    wanted = np.zeros((1, 64), np.float32)
    wanted[0, :4], wanted[0, 32] = [0.5, 1, 6, -6], -1 / 8
    for found in (
        quantised.decode_fp4(packed, scales),
        dequantize_groups(packed, E8M0_VALUES[scales]),
    ):
        np.testing.assert_array_equal(found, wanted)
        # each byte 0x80 is 0 and -0
        assert np.signbit(found[0, 35::2]).all() and not np.signbit(found[0, 34::2]).any()
    # 0x38 = 1, 0x7E = 448, 0x01 = 2^-9, 0xB4 = -0.75
    codes, one = np.array([[0x38, 0x7E, 0x01, 0xB4]], np.uint8), np.array([[128]], np.uint8)
    for found in (
        quantised.decode_fp8(codes, Stored("F8_E8M0", one.shape, one.tobytes())),
        dequantize_blocks(codes, E8M0_VALUES[one], (128, 128)),
    ):
        np.testing.assert_array_equal(found, np.float32([[2, 896, 2**-8, -1.5]]))


def test_the_quantiser_by_hand() -> None:
    """Scales are the smallest powers of two that hold a group, and the first code is low."""
    row = np.zeros((1, 64))
    row[0, :4], row[0, 32:34] = [12, -3, 1, 0.9], [0.75, 0.125]
    packed, scales = quantised.quantise_fp4(row)
    # 12 = 6 * 2^1; 0.75 = 6 * 2^-3
    assert scales.tolist() == [[128, 124]]
    # 6, -1.5; 0.5, 0.45 -> 0.5; then 6, 1
    assert packed[0, :2].tolist() == [0xB7, 0x11] and packed[0, 16] == 0x27


def test_every_code_with_every_scale() -> None:
    """All 16 codes in both halves of a byte, times all 255 scales."""
    codes = np.arange(16, dtype=np.uint8)
    packed = np.tile(np.concatenate([codes, codes << 4]), (255, 1))
    scales = np.tile(np.arange(255, dtype=np.uint8)[:, None], (1, 2))
    with np.errstate(over="ignore"):
        found = dequantize_groups(packed, E8M0_VALUES[scales])
        wanted = (E2M1 * E8M0[:255, None]).astype(np.float32)
    zeros = np.zeros_like(wanted)
    np.testing.assert_array_equal(found[:, 0:32:2], wanted)
    np.testing.assert_array_equal(found[:, 33::2], wanted)
    np.testing.assert_array_equal(found[:, 1:32:2], zeros)
    np.testing.assert_array_equal(found[:, 32::2], zeros)
    assert np.isnan(E8M0_VALUES[255])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_any_fp4_matrix(rows: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (rows, 16 * groups), np.uint8)
    scales = rng.integers(0, 250, (rows, groups), np.uint8)
    found = dequantize_groups(packed, E8M0_VALUES[scales])
    np.testing.assert_array_equal(found, quantised.decode_fp4(packed, scales))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_wide_blocks_are_those_that_e4m3_would_round(
    rows: int, groups: int, spread: int, seed: int
) -> None:
    """A block is exact in FP8 with the scale of its largest group, unless it is counted."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (rows, 16 * groups), np.uint8)
    packed[rng.random(rows) < 0.2] = 0x80
    scales = rng.integers(100, 101 + spread, (rows, groups), np.uint8)
    exact = set(E4M3[~np.isnan(E4M3)].tolist())
    values, wide, count = quantised.decode_fp4(packed, scales).astype(np.float64), 0, 0
    for i in range(0, rows, 128):
        for j in range(0, groups, 4):
            block = values[i : i + 128, 32 * j : 32 * j + 128]
            used = np.abs(block).reshape(len(block), -1, 32).max(axis=2) > 0
            exponents = scales[i : i + 128, j : j + 4][used].astype(int)
            count += 1
            if len(exponents) and exponents.max() - exponents.min() > 14:
                wide += 1
            elif len(exponents):
                scale = 2.0 ** (exponents.max() - 127 - 6)
                assert set((block / scale).ravel().tolist()) <= exact
    assert wide_blocks(packed, scales) == (wide, count)


def test_weights_are_those_of_the_twin(pair: tuple[Path, Path]) -> None:
    found, wanted = (loaded(folder) for folder in pair)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, name)


CODES, SCALES = "codes[first : first + BLOCK]", "scales[first : first + BLOCK"
FAULTS = {
    "the first value is in the high bits": (
        *("dequantize_groups", CODES),
        f"({CODES} << 4) | ({CODES} >> 4)",
    ),
    "no sign": ("dequantize_groups", CODES, f"{CODES} & 0x77"),
    "scales of the group before": (
        *("dequantize_groups", SCALES),
        SCALES.replace("scales", "np.roll(scales, 1, axis=1)"),
    ),
    "scales of the row before": (
        *("dequantize_groups", SCALES),
        SCALES.replace("scales", "np.roll(scales, 1, axis=0)"),
    ),
    "exponents by another bias": ("to_float32", "E8M0_VALUES[raw]", "E8M0_VALUES[raw + 1]"),
    "scales read as e4m3": ("to_float32", "E8M0_VALUES[raw]", "decode_e4m3(raw)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(
    fault: str, released: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wrong reading of the formats gives other weights."""
    name, before, after = FAULTS[fault]
    put_in(monkeypatch, dequantize, name, before, after)
    # tensors are converted there
    monkeypatch.setattr(sources, name, getattr(dequantize, name))
    found, wanted = (
        loaded(folder)["model.layers.1.ffn.experts.3.w1.weight"] for folder in released
    )
    assert not np.array_equal(found, wanted)


def test_logits_are_those_of_the_twin(pair: tuple[Path, Path]) -> None:
    prompts = [CASE.prompt(n) for n in (3, 17, 64)]
    found, wanted = (
        prompt_logits(make_runner(load_model(folder), CASE.block_size), prompts, 16)
        for folder in pair
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_answers_are_those_of_the_twin(released: tuple[Path, Path]) -> None:
    prompts = [CASE.prompt(n) for n in (12, 40)]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    drawn = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    answers = []
    for folder in released:
        with engine_of(folder) as llm:
            answers.append([tokens_of(llm, prompts, params) for params in (greedy, drawn)])
    assert answers[0] == answers[1]


@pytest.mark.oracle
def test_logits_of_transformers(tmp_path: Path) -> None:
    """transformers dequantises the same folder, and gives the same logits within rounding."""
    from tests.v4_model.hugging_face import load_dequantised, logits

    # transformers derives blocks from the number of scales, so all of them must be full
    sizes = {"hidden_size": 128, "q_lora_rank": 64, "o_lora_rank": 32}
    case = replace(CASE, changes=CASE.changes | sizes)
    folder, _ = write_pair(tmp_path, FP4, case)
    oracle = load_dequantised(folder)
    prompt = case.prompt(40)
    (found,) = prompt_logits(make_runner(load_model(folder), 16), [prompt], 64)
    np.testing.assert_allclose(found, logits(oracle, prompt), rtol=0, atol=TOLERANCE)


def test_the_log_counts_blocks_that_fp8_would_round(
    released: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = stored_tensors(released[0])
    name = "layers.2.ffn.experts.1.w2.scale"
    scales = np.frombuffer(tensors[name].data, np.uint8).reshape(tensors[name].shape).copy()
    scales[5, 0] = scales.max() - 15
    changed = tensors | {name: Stored("F8_E8M0", scales.shape, scales.tobytes())}
    folder = written(tmp_path, changed)
    for one, count in ((released[0], 0), (folder, 1)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fd_dsa"):
            loaded(one)
        # of 4 layers with 6 experts, w1 and w3 [64, 160] and w2 [160, 64]
        assert f"FP8 would round {count} of 144 blocks of 128 x 128" in caplog.text


def test_the_plan_counts_float32(pair: tuple[Path, Path]) -> None:
    """A CPU holds every weight in float32, whatever the file stores."""
    found, wanted = (
        make_plan(EngineConfig(model=folder, device="cpu", block_size=16)).memory for folder in pair
    )
    assert found.weight_bytes == wanted.weight_bytes
    values = sum(array.size for array in loaded(pair[1]).values())
    assert found.weight_bytes == 4 * values
