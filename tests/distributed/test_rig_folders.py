"""Checkpoints of `rig_engine.py`, with which real ranks answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import demo_model_path
from tests.distributed.rig_engine import fp8_folder, v4_folder

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("make", [fp8_folder, v4_folder])
def test_a_checkpoint_of_ranks_is_served(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Only tests on GPUs use them, so a change of the writer shows here."""
    options = {"device": "cpu", "tokenizer": demo_model_path(), "max_model_len": 256}
    with LLM(make(tmp_path / "model"), **options) as llm:
        [output] = llm.generate(["One"], SamplingParams(temperature=0, max_tokens=3))
    assert len(output.token_ids) == 3
