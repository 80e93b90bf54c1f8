"""Contexts of one request: sizes of the calls, and shares of the floor."""

from __future__ import annotations

from typing import Any, cast

import pytest

from benchmarks._gpu_engine_model import Shape
from benchmarks._harness import Worker
from benchmarks.long_contexts import cases


class Engine:
    """An engine that computes 10,000 prompt tokens a second, and a token in 4 ms."""

    def __init__(self) -> None:
        self.most_tokens = 0

    def call(self, op: str, batch: int, prompt: int, new: int) -> dict[str, Any]:
        assert batch == 1
        # the request of `decode` may also get a token for each chunk, and 8 more
        spare = prompt // 8192 + 8 if op == "decode" else 0
        self.most_tokens = max(self.most_tokens, prompt + spare + new)
        return {"tok_s": 1e4} if op == "prefill" else {"tpot_ms": 4.0}


@pytest.mark.parametrize("length", [8192, 163840])
def test_a_request_fits_the_context(length: int) -> None:
    engine = Engine()
    first, after = cases(cast(Worker, engine), length, 8192, 64, Shape())
    assert length - 2 <= engine.most_tokens <= length
    assert first["ours_value"] == pytest.approx(0.1 * length, rel=0.02)
    assert after["ours_value"] == 4.0
    assert after["share_of_floor"] == pytest.approx(after["floor"] / 4.0)
