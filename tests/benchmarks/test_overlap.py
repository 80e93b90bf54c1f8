"""The timeline of the overlap's result, where it comes from, and the thresholds."""

from __future__ import annotations

from typing import Any

import pytest


def kernel(name: str, stream: int, start_us: float, us: float) -> dict[str, Any]:
    return {"name": name, "stream": stream, "start_us": start_us, "us": us}


def result() -> dict[str, Any]:
    """A layer on one stream, and on two."""
    one = [kernel("QKV-A", 0, 0, 12), kernel("projections", 0, 12.5, 8)]
    two = [kernel("projections", 1, 0, 8), kernel("QKV-A", 0, 0.5, 12)]
    ends = kernel("indexer query", 0, 30, 7)
    return {"timeline": {"one stream": [*one, ends], "two streams": [*two, ends]}}


def test_the_timeline_is_drawn_by_stream() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import digest, picture

    svg = picture(result())
    assert svg == picture(result()) and digest(result()) in svg
    for text in ("one stream, main", "two streams, main", "two streams, second", "QKV-A"):
        assert text in svg
    assert "one stream, second" not in svg
    changed = result()
    changed["timeline"]["two streams"][0]["us"] = 8.5
    assert digest(changed) not in svg


def test_kernels_of_a_trace_by_stream_and_part() -> None:
    pytest.importorskip("torch")
    from benchmarks._timeline import kernels

    def launched(correlation: int, ts: float) -> dict[str, Any]:
        args = {"correlation": correlation}
        return {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": ts, "args": args}

    def ran(name: str, correlation: int, stream: int, ts: float, dur: float) -> dict[str, Any]:
        args = {"correlation": correlation, "stream": stream}
        return {"cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": args}

    events = [
        {"cat": "user_annotation", "name": "QKV-A", "ts": 10, "dur": 5},
        {"cat": "user_annotation", "name": "projections", "ts": 2, "dur": 6},
        *(launched(1, 1), launched(2, 3), launched(3, 12), launched(4, 20)),
        ran("of the warm-up", 9, 7, 0, 1),
        ran("spin_kernel(long)", 1, 7, 50, 40),
        ran("gemm", 3, 7, 91.5, 9),
        ran("project", 2, 20, 91, 4),
        ran("add", 4, 7, 101, 2),
        {"cat": "ac2g", "name": "flow", "ts": 3},
    ]
    assert kernels(events) == [
        {"name": "projections", "stream": 1, "start_us": 0, "us": 4},
        {"name": "QKV-A", "stream": 0, "start_us": 0.5, "us": 9},
        {"name": "add", "stream": 0, "start_us": 10, "us": 2},
    ]


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
