"""The result of `load`: both sides of each load, and a case for each of their figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._arrivals import LENGTHS, Load
from benchmarks.gpu_engine import is_of_now

OURS, PEER = "fd_dsa", "vLLM"
# one GPU, several GPUs
_TARGETS = "P35", "P36"


class Figure(NamedTuple):
    """A figure of a load.

    Attributes:
        path: keys of the figure in a side's result.
        unit: its unit.
        is_latency: True if less is better.
        has_target: True if a target is set for it.
    """

    path: tuple[str, ...]
    unit: str
    is_latency: bool = True
    has_target: bool = True


FIGURES = {
    "first token p50": Figure(("first_token_ms", "p50"), "ms"),
    "first token p99": Figure(("first_token_ms", "p99"), "ms"),
    "time per token p50": Figure(("token_ms", "p50"), "ms"),
    "time per token p99": Figure(("token_ms", "p99"), "ms"),
    "gap p99": Figure(("gap_ms", "p99"), "ms", has_target=False),
    "good answers": Figure(("good_per_s",), "a second", is_latency=False),
}


def cases_of(loads: Iterable[Mapping[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """Return a case for each load and figure.

    Args:
        loads: `load`, `lengths`, `rate` and the `sides` of each, by name.
        ranks: number of GPUs.
    """
    return [
        {"case": f"{load['load']}: {name}", "lengths": load["lengths"], "rate": load["rate"]}
        | {"figure": name, "target": _TARGETS[ranks > 1] if figure.has_target else None}
        | _compared(figure, load["sides"])
        for load in loads
        for name, figure in FIGURES.items()
    ]


def _compared(figure: Figure, sides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a figure of both sides, and the ratio, which is above 1 where ours is better.

    Latencies have no ratio if a request of a side failed, because a failed request has no latency.
    """
    values = {name: reduce(getitem, figure.path, side) for name, side in sides.items()}
    ours, peer = values[OURS], values.get(PEER)
    failed = sum(side["failed"] for side in sides.values())
    ratio = _ratio(peer, ours) if figure.is_latency else _ratio(ours, peer)
    found = {
        "peer": PEER,
        "peer_value": peer,
        "ours_value": ours,
        "unit": figure.unit,
        "ratio": None if figure.is_latency and failed else ratio,
        "failed": failed,
        "ours_taken": sides[OURS]["taken"],
    }
    return found | ({"peer_taken": sides[PEER]["taken"]} if PEER in sides else {})


def gaps_of(loads: Iterable[Mapping[str, Any]], target_ms: float) -> list[dict[str, Any]]:
    """Return our p99 of the gaps between two tokens beside the target of each load.

    The ratio is above 1 where gaps stay below the target.

    Args:
        loads: as for `cases_of`.
        target_ms: `--target-inter-token-latency-ms` of our server.
    """
    found = []
    for load in loads:
        gap_ms = load["sides"][OURS]["gap_ms"]["p99"]
        gaps = {"load": load["load"], "target": "P36", "target_ms": target_ms, "p99_ms": gap_ms}
        found.append(gaps | {"ratio": _ratio(target_ms, gap_ms)})
    return found


def _ratio(value: Any, divisor: Any) -> float | None:
    """Return the ratio of two figures, or None without one of them or with a divisor of 0."""
    return None if value is None or not divisor else float(value / divisor)


def opened(path: Path, fresh: dict[str, Any], *, is_peer_alone: bool) -> dict[str, Any]:
    """Return the result in a file if this run may add to it, otherwise the fresh one.

    Args:
        path: the file.
        fresh: result of this run, without loads.
        is_peer_alone: True = the model must be the same; False = commit and machine too.
    """
    if not path.is_file():
        return fresh
    before: dict[str, Any] = json.loads(path.read_text())
    same = all(before[key] == fresh[key] for key in ("layers", "dense", "experts"))
    if not is_peer_alone:
        keys = ("commit", "dirty", "cpu", "gpu")
        same &= before["tier"] == fresh["tier"]
        same &= all(before["env"][key] == fresh["env"][key] for key in keys)
    return before if same else fresh


def put(
    result: dict[str, Any], load: Load, arrivals: Path, side: str, found: Mapping[str, Any]
) -> None:
    """Put a side of a load into a result. Ours replaces both sides of an earlier run.

    Args:
        arrivals: file of the arrivals.
        side: OURS or PEER.
        found: result of the side.
    """
    loads = {one["load"]: one for one in result["loads"]}
    if side == OURS:
        new = {"load": load.name, **asdict(load), "arrivals": _digest(arrivals), "sides": {}}
        loads[load.name] = new
    loads[load.name]["sides"][side] = found
    order = list(LENGTHS)
    result["loads"] = sorted(
        loads.values(), key=lambda one: (order.index(one["lengths"]), one["rate"])
    )
    result["cases"] = cases_of(result["loads"], result["ranks"])
    result["gaps"] = gaps_of(result["loads"], result["target_ms"])


def refuse_others(result: Mapping[str, Any], arrivals: Mapping[Load, Path]) -> None:
    """Make sure that a peer's figures belong beside ours.

    Args:
        arrivals: file of the arrivals of each load.

    Raises:
        SystemExit: our side of a load is missing, older than an hour, of another GPU or of other
            arrivals.
    """
    loads = {one["load"]: one for one in result["loads"]}
    for load, path in arrivals.items():
        one = loads.get(load.name, {})
        if one.get("arrivals") != _digest(path) or not is_of_now(one["sides"][OURS]["taken"]):
            raise SystemExit(
                f"{load.name}: measure ours first, with the same flags, on this GPU and within the "
                "hour"
            )


def _digest(path: Path) -> str:
    """Return a hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
