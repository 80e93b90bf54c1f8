"""Timers of calls on a GPU: replays of graphs, pairs of events, the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch

from benchmarks._harness import percentiles

Call = Callable[[], Any]
Times = dict[str, dict[str, float]]

# replays of short calls and event pairs of long ones
_GRAPH_BELOW_US = 400.0
_REPLAY_US = 2000.0


def _replay(calls: Sequence[Call], rough_us: float) -> Callable[[], float]:
    """Return a timer by replays of a captured graph of many calls, microseconds a call."""
    rounds = max(1, round(_REPLAY_US / max(rough_us, 2.0) / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            call()
    graph.replay()
    return lambda: _between_events(graph.replay) / (rounds * len(calls))


def _events(calls: Sequence[Call], rough_us: float) -> Callable[[], float]:
    """Return a timer by events, each time with the next input set."""
    following = cycle(calls)
    return lambda: _between_events(next(following))


def _wall(calls: Sequence[Call], rough_us: float, wait_inside: bool = True) -> Callable[[], float]:
    """Return a timer by the host's clock.

    Args:
        wait_inside: True to include the device's work.
    """
    num_calls = max(len(calls), min(200, round(10_000 / rough_us)))

    def sample() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for index in range(num_calls):
            calls[index % len(calls)]()
        if wait_inside:
            torch.cuda.synchronize()
        elapsed = time.perf_counter_ns() - begin
        torch.cuda.synchronize()
        return elapsed / 1e3 / num_calls

    return sample


_MODES = {
    "graph": _replay,
    "events": _events,
    "wall": _wall,
    "host": partial(_wall, wait_inside=False),
}


def _between_events(call: Call) -> float:
    """Return the device time of one call, microseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _rough(calls: Sequence[Call]) -> float:
    """Warm up every call on a side stream, as a capture asks, and time three roughly."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return _between_events(lambda: [calls[i % len(calls)]() for i in range(3)]) / 3


def interleaved(
    sides: Mapping[str, Sequence[Call]], *, mode: str = "auto", rounds: int = 30
) -> Times:
    """Return percentiles of every side, timed in turn in one loop.

    The modes are:

    - "graph": replays of a captured graph.
    - "events": one call between two events.
    - "wall": host time until the device is done.
    - "host": host time without a wait for the device.
    - "auto": "graph" for calls that are short on the device (below 400 us), else "events".

    Args:
        sides: label -> calls, each over its own input set.
        mode: name of a mode.
        rounds: samples of each side.

    Returns:
        label -> p20, p50, p80 in microseconds a call.
    """
    timers = {}
    for label, calls in sides.items():
        rough_us = _rough(calls)
        chosen = mode
        if mode == "auto":
            chosen = "graph" if rough_us < _GRAPH_BELOW_US else "events"
        timers[label] = _MODES[chosen](calls, rough_us)
    samples: dict[str, list[float]] = {label: [] for label in timers}
    for _ in range(rounds):
        for label, timer in timers.items():
            samples[label].append(timer())
    return {label: percentiles(values) for label, values in samples.items()}
