"""When each kernel of a call ran, and on which stream, from a trace of torch's profiler."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks._gpu import Call, trace_events
from benchmarks._layer import Step

# the host queues a whole layer while this spins, so that no gap of the picture is the host's
_SPIN_CYCLES = 4_000_000


def traced(step: Step, call: Call) -> list[dict[str, Any]]:
    """The kernels of one warm call, in the order of their begins.

    Returns:
        `name` of the part of the layer (else of the kernel), `stream` 0 for the one with most of
        the kernels, `start_us` and `us`; times from the first begin on.
    """
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    before = step.layer.span
    step.layer.span = torch.profiler.record_function
    try:
        with torch.profiler.profile(activities=activities) as profiler:
            torch.cuda._sleep(_SPIN_CYCLES)
            call()
            torch.cuda.synchronize()
    finally:
        step.layer.span = before
    return kernels(trace_events(profiler))


def kernels(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The kernels of a trace after the one that spins, as `traced` returns them."""
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat") == "user_annotation"
    )
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    found = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    while found and "spin" not in found[0]["name"]:
        found.pop(0)
    found = found[1:]
    by_use = Counter(event["args"]["stream"] for event in found).most_common()
    streams = {stream: index for index, (stream, _) in enumerate(by_use)}
    result = []
    for event in found:
        stream = streams[event["args"]["stream"]]
        when = launched.get(event["args"].get("correlation"))
        result.append(
            {
                "name": _span_at(spans, when) or event["name"][:40],
                "stream": stream,
                "start_us": round(event["ts"] - found[0]["ts"], 3),
                "us": round(event["dur"], 3),
            }
        )
    return result


def _span_at(spans: Sequence[tuple[float, float, str]], when: float | None) -> str | None:
    """Name of the span that began last before `when` and holds it."""
    if when is None:
        return None
    for start, end, name in reversed(spans[: bisect_right(spans, (when, float("inf"), ""))]):
        if start <= when <= end:
            return name
    return None
