"""Checkpoints in four bits: the same weights, logits and answers as their values in float32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.doctor.plan import plan
from fd_dsa.models import dequantize, packing
from fd_dsa.models.registry import open_checkpoint, read_config
from fd_dsa.startup.plan import make_plan
from tests.models.four_bits import FORMATS, Format, write_pair, write_unpacked
from tests.parity.engine_side import make_runner, prompt_logits
from tests.v4_model.ours import load_model
from tests.v4_model.quantised import loaded
from tests.v4_model.test_wrong_builds import put_in

EXPERT = "model.layers.1.mlp.experts.3."


@pytest.fixture(scope="module", params=FORMATS)
def kind(request: pytest.FixtureRequest) -> Format:
    """A format."""
    return FORMATS[request.param]


@pytest.fixture(scope="module")
def pair(kind: Format, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder in the format and its twin."""
    return write_pair(tmp_path_factory.mktemp("pair"), kind)


def test_weights_are_those_of_the_twin(pair: tuple[Path, Path]) -> None:
    found, wanted = (loaded(folder) for folder in pair)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, name)


def test_logits_are_those_of_the_twin(pair: tuple[Path, Path], kind: Format) -> None:
    prompts = [kind.case.prompt(n) for n in (3, 17, 64)]
    found, wanted = (prompt_logits(make_runner(load_model(folder)), prompts, 16) for folder in pair)
    for one, other in zip(found, wanted, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)


def test_the_plan_counts_float32(pair: tuple[Path, Path]) -> None:
    """A CPU holds every weight in float32, whatever the file stores."""
    found, wanted = (make_plan(EngineConfig(model=one, device="cpu")).memory for one in pair)
    assert found.weight_bytes == wanted.weight_bytes
    assert found.weight_bytes == 4 * sum(array.size for array in loaded(pair[1]).values())


RANKS, DRAFTS = {"tensor_parallel_size": 2}, {"speculative_config": {"method": "mtp"}}


@pytest.mark.parametrize(
    ("name", "options"),
    [("nvfp4 of modelopt", DRAFTS), ("gptq, act-order", {}), ("awq", RANKS), ("w4afp8", {})],
)
def test_answers_are_those_of_the_twin(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    kind = FORMATS[name]
    prompts = [kind.case.prompt(n) for n in (12, 40)]
    forms: tuple[dict[str, Any], ...] = {"temperature": 0}, {"temperature": 1.0, "seed": 3}
    answers = []
    for folder in write_pair(tmp_path, kind, mtp=options == DRAFTS):
        sizes = {"device": "cpu", "block_size": 16, "max_num_seqs": 4}
        with LLM(model=folder, **sizes, **options) as llm:
            for form in forms:
                params = SamplingParams(max_tokens=12, ignore_eos=True, **form)
                found = llm.generate(prompts, params)
                answers.append([answer.outputs[0].token_ids for answer in found])
    assert answers[:2] == answers[2:]


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_of_ranks(axis: int, pair: tuple[Path, Path]) -> None:
    """Rows and columns that a rank holds, also if they cut words and groups."""
    config, name = read_config(pair[0]), f"{EXPERT}down_proj.weight"
    with open_checkpoint(config, pair[0]) as checkpoint:
        whole = checkpoint.tensor(name, config.weight_block_size, config.packing)
        values, part = whole.float32(), whole.narrowed(axis, 20, 52)
        np.testing.assert_array_equal(part.float32(), np.take(values, range(20, 52), axis))


def test_words_worked_out_by_hand() -> None:
    """The orders of AWQ and GPTQ, from the text of the formats."""
    row = np.arange(8, dtype=np.uint32)[None]
    for layout, word in ((packing.AWQ, 0x75316420), (packing.GPTQ, 0x76543210)):
        kind = replace(layout, group_size=None, zero_offset=0)
        # one word of rows 0 to 7 of a column, or of columns 0 to 7 of a row
        found = unpacked(kind, qweight=[[word]] * (8 if kind.code_axis else 1))
        columns = np.tile(row, (8, 1)) if not kind.code_axis else np.tile(row.T, (1, 8))
        np.testing.assert_array_equal(found, columns[: len(found)].astype(np.float32))


def unpacked(kind: packing.Packing, qweight: list[list[int]]) -> np.ndarray:
    """Values of words with the scale 1 and the zero point 0."""
    words = np.array(qweight, np.uint32)
    words = words if kind.code_axis else np.tile(words, (1, 8))
    zeros, scales = np.zeros((1, 1), np.uint32), np.ones((1, 8), np.float32)
    found = {"": ("I32", words), "_zeros": ("I32", zeros), "_scale_inv": ("F32", scales)}
    return kind.unpack(
        {
            end: (
                dequantize.TensorInfo(end, dtype, values.shape, Path("file"), 0, values.nbytes),
                np.ascontiguousarray(values).view(np.uint8).reshape(-1),
            )
            for end, (dtype, values) in found.items()
        }
    )


FAULTS: dict[str, tuple[str, Any, str, str, str]] = {
    "the first value is in the high bits": (
        *("gptq", packing, "_nibbles"),
        *("[packed & 15, packed >> 4]", "[packed >> 4, packed & 15]"),
    ),
    "zero points of version 2": (
        *("gptq", packing.Packing, "_zeros", "zeros += self.zero_offset", "zeros += 0"),
    ),
    "a multiplier in place of a divisor": (
        *("nvfp4 of compressed-tensors", packing.Packing, "unpack"),
        *("scales / factor if self.divides", "scales * factor if self.divides"),
    ),
    "unsigned values": (*("w4afp8", packing.Packing, "unpack", " ^ np.uint8(_MIDDLE)", ""),),
    "AWQ in order": (*("awq", packing.Packing, "_words", "[..., self.order]", ""),),
    "groups of neighbours": (
        *("gptq, act-order", packing.Packing, "unpack"),
        *("if GROUPS_SUFFIX in parts", "if False"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wrong reading of the formats gives other weights."""
    kind, place, name, before, after = FAULTS[fault]
    folders = write_pair(tmp_path, FORMATS[kind])
    put_in(monkeypatch, place, name, before, after)
    found, wanted = (loaded(folder)[f"{EXPERT}up_proj.weight"] for folder in folders)
    assert not np.array_equal(found, wanted)


def test_a_float_matrix_beside_packed_ones(tmp_path: Path) -> None:
    """The dtype of a tensor decides, so a module that was left out is read as it is."""
    kind = FORMATS["gptq"]
    folder, twin = write_pair(tmp_path, kind)
    values = write_unpacked(folder, twin, kind, f"{EXPERT}up_proj")
    np.testing.assert_array_equal(loaded(folder)[f"{EXPERT}up_proj.weight"], values)


def test_formats_in_their_own_file(tmp_path: Path) -> None:
    """ModelOpt's hf_quant_config.json, also without the object in config.json."""
    for name, formats, given in (
        ("nvfp4 of modelopt", {"quant_algo": "NVFP4", "group_size": 16}, None),
        ("w4afp8", {"quant_algo": "MIXED_PRECISION"}, {"quant_method": "fp8"}),
    ):
        folder, twin = write_pair(tmp_path / name, FORMATS[name])
        fields = FORMATS[name].case.config | ({"quantization_config": given} if given else {})
        (folder / "config.json").write_text(json.dumps(fields))
        text = json.dumps({"producer": {"name": "modelopt"}, "quantization": formats})
        (folder / "hf_quant_config.json").write_text(text)
        found, wanted = (loaded(one)[f"{EXPERT}up_proj.weight"] for one in (folder, twin))
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("nvfp4 of modelopt", 4 + 8 / 16),
        ("gptq, symmetric", 4 + 32 / 128),
        ("awq", 4 + 32 / 128),
        ("gptq, act-order", 16),
    ],
)
def test_the_plan_for_gpus_counts_four_bits(name: str, bits: float, tmp_path: Path) -> None:
    """The configuration is DeepSeek-V3.2's, without weights. Act-order is held in bfloat16."""
    fields = {"model_type": "deepseek_v32", "quantization_config": FORMATS[name].fields}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = plan(tmp_path, 4)["parts"]["routed experts"]
    matrices = 58 * 256 * 3
    factors = 4 * matrices * ("nvfp4" in name)
    assert found == matrices * 7168 * 2048 // 4 * bits / 8 + factors
