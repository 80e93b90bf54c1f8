"""docs/several-gpus.md shows what `fd-dsa doctor --plan` prints; errors of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks._harness import ROOT
from benchmarks._published import MODELS, V32, plan_lines
from benchmarks.report import regions
from fd_dsa import doctor
from fd_dsa.models.four_bit_experts import four_bit_experts
from fd_dsa.models.loader import fp8_tensors
from fd_dsa.models.registry import open_checkpoint, read_config
from fd_dsa.startup.memory import weight_bytes, weight_parts
from tests.models.folders import TINY, TINY_FP8
from tests.models.four_bits import FORMATS, write_pair
from tests.v4_model.cases import CASES


def folder_of(root: Path, config: dict[str, Any]) -> Path:
    """A folder with a config.json alone."""
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    return root


def printed(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> str:
    """Return the output of the command for a folder."""
    assert doctor.main(["--plan", str(folder), *flags]) == 0
    return capsys.readouterr().out.replace(f"{folder.parent}/", "")


def test_the_page_shows_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = "DeepSeek-V3.2-REAP-345B"
    output = printed(capsys, folder_of(tmp_path / name, MODELS[name]), "-tp", "4")
    shown = regions((ROOT / "docs/several-gpus.md").read_text("utf-8"))["plan_lines"]
    assert shown == plan_lines() == f"```\n{output}```\n"


@pytest.mark.parametrize(("name", "absent"), [("V3.2", []), ("V4-Flash", ["dense MLPs"])])
def test_parts_are_the_whole_and_are_split(name: str, absent: list[str], tmp_path: Path) -> None:
    whole = read_config(folder_of(tmp_path / name, MODELS[f"DeepSeek-{name}"]))
    parts, split = (weight_parts(one, "bfloat16") for one in (whole, whole.split(8)))
    assert sum(split.values()) == weight_bytes(whole.split(8), "bfloat16")
    same, sinks = ("embedding", "indexers, routers, others"), 0
    if name == "V4-Flash":
        # they belong to heads, too
        sinks = 4 * whole.num_hidden_layers * (whole.num_attention_heads - 8)
    for part, size in parts.items():
        rest = sinks if part == same[1] else 0
        assert split[part] * (1 if part in same else 8) + rest == size, part
    assert [part for part, size in parts.items() if size == 0] == absent


@pytest.mark.parametrize(
    ("config", "flags", "said"),
    [
        (TINY, ["-tp", "3"], "--tensor-parallel-size: got 3, allowed: a divisor of the model's"),
        (TINY, ["-tp", "9"], "--tensor-parallel-size: got 9, allowed: at most 8"),
        (TINY_FP8, ["-tp", "2"], "whole blocks of 128 of FP8 weights"),
        (TINY, ["-tp", "0"], "--tensor-parallel-size/-tp: got '0'; must be a whole"),
        (TINY | {"hidden_size": -1}, [], "config.json: hidden_size: got -1"),
        (TINY | {"swiglu_limit": 7}, [], "config.json: swiglu_limit: got 7, allowed: fields that"),
        ({"model_type": "hy_v4"}, [], "is not served yet: a gate and sinks in attention"),
        (CASES["mixed"].config, ["-tp", "4"], "got 4, allowed: a divisor of the model's o_groups"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: Any, flags: list[str], said: str
) -> None:
    assert doctor.main(["--plan", str(folder_of(tmp_path, config)), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_unknown_fields_are_accepted_on_demand(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, V32 | {"strange": 7})
    plain = folder_of(tmp_path / "plain", V32)
    found = printed(capsys, folder, "--allow-unknown-config-fields").splitlines()[1:]
    assert found[0] == "unknown fields of config.json, ignored: strange"
    assert found[1:] == printed(capsys, plain).splitlines()[1:]


def test_the_command_names_the_states_of_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = printed(capsys, folder_of(tmp_path, MODELS["DeepSeek-V4-Flash"]), "-tp", "4")
    assert "\n  states of 256 rows in bfloat16      7.76\n" in found
    assert "\n  states of 256 rows in fp8_ds_mla    6.03\n" in found and "dense MLPs" not in found


@pytest.mark.parametrize("name", ["nvfp4 experts, fp8 attention", "w4afp8"])
def test_experts_in_four_bits_take_as_much_without_weights(name: str, tmp_path: Path) -> None:
    folder, _ = write_pair(tmp_path, FORMATS[name])
    config = read_config(folder)
    with open_checkpoint(config, folder) as checkpoint:
        held = fp8_tensors(checkpoint, config), four_bit_experts(checkpoint, config, 1)
        stored = weight_parts(config, "bfloat16", *held)
    held = fp8_tensors(None, config), four_bit_experts(None, config, 1)
    planned = weight_parts(config, "bfloat16", *held)
    assert planned["routed experts"] == stored["routed experts"] > 0


def test_a_folder_is_needed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["--plan", str(tmp_path / "none")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"fd_dsa: error: --plan: got '{tmp_path / 'none'}', allowed: ")
    assert doctor.main(["-tp", "2"]) == 2
    assert "--plan" in capsys.readouterr().err
