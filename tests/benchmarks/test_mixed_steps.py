"""Entries of steps with decode rows and a prompt."""

from __future__ import annotations

import pytest

from benchmarks.mixed_steps import case_of
from benchmarks.workers.mixed_steps import Engine

TIMED = {"ms": {"p20": 30.0, "p50": 33.0, "p80": 40.0}, "tokens": [512], "captured": 1.0}


def test_a_ratio_is_the_wall_time_over_the_time_of_the_gpus_work() -> None:
    case = case_of("short", 2048, TIMED, {"busy_us": 30_000.0, "launches": 1800, "kernels": []})
    assert case["case"] == "short, 2,048 tokens" and case["launches"] == 1800
    assert case["ratio"] == pytest.approx(1.1)


def test_a_step_without_a_gpu_has_no_ratio() -> None:
    assert case_of("long", 64, TIMED, None)["ratio"] is None


@pytest.mark.slow
def test_steps_have_the_tokens_that_were_asked_for() -> None:
    from fd_dsa.config import demo_model_path

    config = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 256}
    engine = Engine(model=str(demo_model_path()), rig=False, config=config, device="cpu")
    for prefix in (0, 128):
        assert engine.begin(rows=3, context=20, prefix=prefix, new=60) == {"rows": 3}
        timed = engine.steps(tokens=40, steps=3)
        assert timed["tokens"] == [40] and timed["ms"]["p50"] > 0
