"""Experts in four bits alongside FP8 ones: a whole run in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("paddle", reason="the weights are Paddle's tensors")

from benchmarks import four_bit_experts
from fd_dsa.triton_runtime import INTERPRETING

pytestmark = pytest.mark.triton


def test_a_dry_run_times_every_kind(tmp_path: Path) -> None:
    if not INTERPRETING:
        pytest.skip("compiled kernels do not run on the CPU")
    flags = ["--dry", "--tokens", "2", "--out", str(tmp_path)]
    assert four_bit_experts.main(flags) == 0
    result = json.loads((tmp_path / "four_bit_experts.json").read_text())
    assert result["tier"] == "dry" and [one["tokens"] for one in result["cases"]] == [2]
    for case in result["cases"]:
        assert case["us"].keys() == four_bit_experts.KINDS.keys()
        for kind, ratio in case["ratio"].items():
            assert ratio == case["us"]["fp8"] / case["us"][kind] > 0
