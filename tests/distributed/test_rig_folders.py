"""Checkpoints of `rig_engine.py`, with which real ranks answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig, demo_model_path
from fd_dsa.startup.plan import make_plan
from tests.distributed.rig_engine import CASES, fp8_folder, served, v4_folder
from tests.startup.hopper import pretend_hopper

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("make", [fp8_folder, v4_folder])
def test_a_checkpoint_of_ranks_is_served(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Only tests on GPUs use them, so a change of the writer shows here."""
    options = {"device": "cpu", "tokenizer": demo_model_path(), "max_model_len": 256}
    with LLM(make(tmp_path / "model"), **options) as llm:
        [output] = llm.generate(["One"], SamplingParams(temperature=0, max_tokens=3))
    assert len(output.token_ids) == 3


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_gpus_can_hold_the_engine_of_a_case(
    case: str, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A CPU holds everything in float32, so its engines do not show what GPUs refuse."""
    pretend_hopper(monkeypatch, 80)
    arguments = served(tmp_path, case) | {"device": "gpu", "tensor_parallel_size": size}
    plan = make_plan(EngineConfig(**arguments))
    assert bool(plan.fp8) == (case in ("fp8", "drafts", "v4"))
    assert bool(plan.four_bits) == (case == "v4")
