"""Copies of steps beside the work of the steps before: how much of them is hidden.

An event is a dict: `name` COPY, EXPAND or WORK; `stream`, 1 for the stream of the copies and 0 for
that of the layers; `start_us` and `us`. Needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

COPY, EXPAND, WORK = "copy", "expand", "a step's work"
# steps of the picture, and microseconds around the end of one that it shows closer
_SHOWN = 3
ZOOM_US = (-30, 120)


def events_of(trace: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What ran on the device, by begin.

    Args:
        trace: `traceEvents` of the profiler's Chrome trace.
    """
    found = sorted(
        (e for e in trace if e.get("cat") in ("kernel", "gpu_memcpy")), key=lambda e: e["ts"]
    )
    events = []
    for event in found:
        copies = event["cat"] == "gpu_memcpy"
        name = COPY if copies else EXPAND if "expand" in event["name"] else WORK
        events.append(
            {
                "name": name,
                "stream": int(copies),
                "start_us": round(event["ts"] - found[0]["ts"], 3),
                "us": round(event["dur"], 3),
            }
        )
    return events


def summary(events: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """How much of each step's copies runs beside work.

    Args:
        events: of all steps, by begin.
        steps: how many they are.

    Returns:
        `copies`, their number a step; `median` and `p5` of the share of a step's copies that ran
        beside work, and `share_of_steps_above_80`; `timeline`, the events of three steps, the
        second's work ending at zero.

    The copies of the first two steps are left out: no step before them can hide them,
    or bring a whole block table.

    Raises:
        ValueError: the number of copies is no multiple of the steps.
    """
    copies = [event for event in events if event["name"] == COPY]
    if not copies or len(copies) % steps:
        raise ValueError(f"{len(copies)} copies in {steps} steps")
    each = len(copies) // steps
    busy = joined([e for e in events if e["name"] == WORK])
    shares = []
    for first in range(2 * each, len(copies), each):
        own = copies[first : first + each]
        hidden = sum(common(copy, busy) for copy in own)
        shares.append(hidden / sum(copy["us"] for copy in own))
    return {
        "copies": each,
        "median": float(np.median(shares)),
        "p5": float(np.percentile(shares, 5)),
        "share_of_steps_above_80": float(np.mean(np.array(shares) >= 0.8)),
        "timeline": _shown(events, busy),
    }


def joined(events: Sequence[Mapping[str, Any]], gap_us: float = 2.0) -> list[tuple[float, float]]:
    """Begin and end of the stretches of work; the gaps between kernels of a step count as work."""
    stretches: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda e: e["start_us"]):
        begin, end = event["start_us"], event["start_us"] + event["us"]
        if stretches and begin - stretches[-1][1] <= gap_us:
            stretches[-1] = stretches[-1][0], max(end, stretches[-1][1])
        else:
            stretches.append((begin, end))
    return stretches


def common(event: Mapping[str, Any], stretches: Sequence[tuple[float, float]]) -> float:
    """Microseconds of an event within the stretches."""
    begin, end = event["start_us"], event["start_us"] + event["us"]
    return sum(max(0.0, min(end, last) - max(begin, first)) for first, last in stretches)


def _shown(
    events: Sequence[Mapping[str, Any]], busy: Sequence[tuple[float, float]]
) -> list[dict[str, Any]]:
    """The events of three steps from the middle on; the second's work ends at zero."""
    own = busy[len(busy) // 2 :][:_SHOWN]
    zero = own[min(1, len(own) - 1)][1]
    return [
        {**event, "start_us": round(event["start_us"] - zero, 3)}
        for event in events
        if own[0][0] <= event["start_us"] < own[-1][1]
    ]
