"""The plan of `fd-dsa doctor --plan` is the plan of a server's start on such a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("paddle")

from benchmarks._published import MODELS
from fd_dsa import doctor
from fd_dsa.config import EngineConfig, demo_model_path
from fd_dsa.errors import ConfigError
from fd_dsa.startup.plan import make_plan
from tests.startup.hopper import pretend_hopper
from tests.v4_model.cases import CASES, GREEDY, Case, write_tokenizer
from tests.v4_model.quantised import FP4, write_pair

Folder = Callable[[Path], Path]


def published(name: str) -> Folder:
    """A folder of a published model without weights."""

    def write(folder: Path) -> Path:
        (folder / "config.json").write_text(json.dumps(MODELS[name]))
        return write_tokenizer(folder)

    return write


# each of two ranks has whole blocks of the weights in FP8
OF_TWO = Case(
    "whole blocks for two ranks",
    {
        "hidden_size": 160,
        "moe_intermediate_size": 256,
        "q_lora_rank": 128,
        "o_lora_rank": 128,
        "head_dim": 64,
    },
    seed=24,
)
FOLDERS: dict[str, Folder] = {
    "demo": lambda _: demo_model_path(),
    "tiny V4": lambda folder: CASES[GREEDY].write_served(folder),
    "tiny V4, FP4 experts": lambda folder: write_pair(folder, FP4, OF_TWO)[0],
    "V4-Flash": published("DeepSeek-V4-Flash"),
    "V4-Pro": published("DeepSeek-V4-Pro"),
}


@pytest.mark.parametrize(
    ("name", "ranks", "fits"),
    [
        ("demo", 1, {80: True}),
        ("tiny V4", 2, {80: True}),
        ("tiny V4, FP4 experts", 2, {80: True}),
        pytest.param("V4-Flash", 2, {80: False, 96: False, 141: True}, marks=pytest.mark.slow),
        ("V4-Flash", 8, {80: True}),
        pytest.param("V4-Pro", 8, {141: "fp8_ds_mla", 180: True}, marks=pytest.mark.slow),
    ],
)
def test_a_start_makes_the_same_plan(
    name: str,
    ranks: int,
    fits: dict[int, bool | str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder = FOLDERS[name](tmp_path)
    assert doctor.main(["--json", "--plan", str(folder), "-tp", str(ranks)]) == 0
    found = json.loads(capsys.readouterr().out)
    given: dict[str, Any] = {
        "model": folder,
        "device": "gpu",
        "tensor_parallel_size": ranks,
        "load_format": "auto" if found["has_weights"] else "dummy",
    }
    for kind, caches in found["caches"].items():
        config = EngineConfig(**given, kv_cache_dtype=kind)
        for gib, kinds in fits.items():
            pretend_hopper(monkeypatch, gib)
            fit = kinds in (True, kind)
            told = caches["gpus"][str(gib)]
            assert (told["tokens"] > 0) == fit == (told["why_not"] == "")
            if not fit:
                with pytest.raises(ConfigError) as refused:
                    make_plan(config)
                assert str(refused.value) == told["why_not"]
                continue
            plan = make_plan(config)
            described = plan.describe()
            memory = described["memory"]
            assert memory["weight_bytes"] == sum(found["parts"].values())
            assert memory["bytes_per_block"] // found["block_size"] == caches["bytes_per_token"]
            assert memory["state_bytes"] == caches["state_bytes"]
            assert memory["num_tokens"] == told["tokens"]
            assert memory["free_bytes"] == int(0.9 * (gib << 30)) - caches["workspace_bytes"]
            assert plan.memory.graph_bytes == caches["graph_bytes"]
            sizes = "max_model_len", "max_num_seqs", "block_size"
            assert [described[size] for size in sizes] == [found[size] for size in sizes]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--plan", ""], "--plan: got '', allowed: a local folder"),
        (["--plan", ".", "-tp", "1e3"], "--tensor-parallel-size/-tp: got '1e3'; must be a whole"),
        (["--plan", ".", "-tp", "0"], "--tensor-parallel-size/-tp: got '0'; must be a whole"),
        (["-tp", "2"], "--tensor-parallel-size: give --plan FOLDER, too"),
        (["--allow-unknown-config-fields"], "--allow-unknown-config-fields: give --plan FOLDER"),
        (["--plan", ".", "--device", "gpu:9"], "--device: not together with --plan"),
        (["--plan", ".", "--fastdeploy"], "--fastdeploy: not together with --plan"),
    ],
)
def test_flags_that_would_have_no_effect_are_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str], error: str
) -> None:
    assert doctor.main(flags) == 2
    assert capsys.readouterr().err.startswith(f"fd_dsa: error: {error}")
