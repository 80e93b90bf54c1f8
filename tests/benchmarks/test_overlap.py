"""The thresholds of the overlap's result."""

from __future__ import annotations

from typing import Any

import pytest


def test_thresholds_end_before_the_first_loss() -> None:
    pytest.importorskip("torch")
    from benchmarks.overlap import thresholds

    def measured(kind: str, *saved: tuple[int, float]) -> list[dict[str, Any]]:
        return [{"num_tokens": tokens, "saved": share, "kind": kind} for tokens, share in saved]

    graph = measured("graph", (256, 0.1), (1, 0.03), (8, 0.02), (64, -0.009), (128, -0.02))
    beside = measured("graph, k_norm beside", (64, -0.02))
    eager = measured("eager", (1, -0.02), (8, 0.1))
    assert thresholds(graph + eager) == {"graph": 64, "eager": 0}
    assert thresholds(graph + beside + eager) == {"graph": 8, "eager": 0}
