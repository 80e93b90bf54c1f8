"""Contexts of one request: sizes of the calls, and shares of the floor."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest

from benchmarks._gpu_engine_model import Shape
from benchmarks._gpu_engine_model import floor as v32_floor
from benchmarks._harness import Worker
from benchmarks._v4_gpu_model import V4Shape
from benchmarks._v4_gpu_model import floor as v4_floor
from benchmarks.long_contexts import ONE_RUN, RUNS, Floor, cases


class Engine:
    """An engine that computes 10,000 prompt tokens a second, and a token in 4 ms."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def call(self, op: str, prompt: int, new: int) -> dict[str, Any]:
        assert op == "alone"
        # a token comes with the prompt
        self.lengths.append(prompt + 1 + new)
        return {"first_ms": prompt / 10, "tpot_ms": 4.0}


@pytest.mark.parametrize(
    ("length", "floor_of"),
    [
        (8192, partial(v32_floor, shape=Shape())),
        (163840, partial(v32_floor, shape=Shape())),
        (1 << 20, partial(v4_floor, shape=V4Shape())),
    ],
)
def test_a_request_fills_the_context(length: int, floor_of: Floor) -> None:
    engine = Engine()
    first, after = cases(cast(Worker, engine), length, 64, floor_of)
    assert engine.lengths == [length] * (1 if length >= ONE_RUN else RUNS)
    assert first["ours_value"] == pytest.approx(0.1 * length, rel=0.02)
    assert after["ours_value"] == 4.0
    assert after["share_of_floor"] == pytest.approx(after["floor"] / 4.0)
    assert first["share_of_floor"] > 0
