"""Ratios of groups of cases, and what the pictures of docs/performance.md show of them.

Every ratio is the time of the other side divided by ours: above 1 fd_dsa is faster. shown.json
lists them by result under "ratios": "against" names the other side, "labels" are those of which the
fastest counts (or "cases" is a key of CASES), "ours" is our side where that is not the one that
serves. The tables "headline" and "without_custom_ops" are those of docs/performance.md. Their rows
are [what, where]: a case belongs to the group if it has the numbers of "where" from the first to
the last of two, and texts that begin as there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks._harness import RESULTS, ROOT, three_digits
from benchmarks._render import Case, Result, Table, refusal

OURS = "fd_dsa"
SHOWN = json.loads(Path(__file__).with_name("shown.json").read_text())
RATIOS, PICTURES = SHOWN["ratios"], SHOWN["pictures"]
TABLES = "headline", "without_custom_ops"
LOADS = {"load": "one GPU", "load_4": "four GPUs", "load_8": "eight GPUs"}
PICTURED = ("engine_cpu", "gpu_engine", *LOADS, *PICTURES)
Ratio = tuple[float, str]
# of a load, in its picture
_FIRST, _TOKEN = "first token p99", "time per token p50"

# "cases" of shown.json: of a result whose cases have no times of sides, the ratios
CASES: dict[str, Callable[[Result], Iterable[float]]] = {
    "engine": lambda result: (case["ratio_p50"] for case in result["cases"]),
    # the share of the engine's tokens per second that the server keeps
    "server": lambda result: (1 - case["servers"][OURS]["loss"] for case in result["cases"]),
    # gaps of a stream without a target, which comes first, against those with one
    "gaps_with_target": lambda result: (
        result["sides"][0]["gap_ms"]["p99"] / side["gap_ms"]["p99"] for side in result["sides"][1:]
    ),
    "gpu_decode": lambda result: _measured(result, _decodes),
    "gpu_prompts": lambda result: _measured(result, lambda case: not _decodes(case)),
    "load_latencies": lambda result: _measured(result, lambda case: case["unit"] == "ms"),
    "load_good": lambda result: _measured(result, lambda case: case["unit"] != "ms"),
}


def _decodes(case: Case) -> bool:
    """Return True for decode steps of an engine, False for prompts and mixed requests."""
    return bool(case["case"].startswith("decode"))


def _measured(result: Result, belongs: Callable[[Case], bool]) -> Iterator[float]:
    """Yield the ratios of the cases that belong to a group, without those of one side alone."""
    for case in result["cases"]:
        if belongs(case) and case["ratio"] is not None:
            yield case["ratio"]


def _of_group(entry: Mapping[str, Any], where: Mapping[str, Any], result: Result) -> list[Ratio]:
    """Return the ratio and name of every case of a group that has one of the other sides."""
    if "cases" in entry:
        return sorted((ratio, "") for ratio in CASES[entry["cases"]](result))
    found = []
    for case in result["cases"]:
        us = {label: time["p50"] for label, time in case["times"].items()}
        others = [us[label] for label in entry["labels"] if label in us]
        if others and all(_fits(case[key], wanted) for key, wanted in where.items()):
            found.append((min(others) / us[entry.get("ours", case["ours"])], case["case"]))
    return sorted(found)


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return value.startswith(wanted)
    return wanted[0] <= value <= wanted[1]


def _rows(table: str, result: Result) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table for a result. Groups without a case are omitted."""
    for entry in RATIOS:
        if entry["result"] == result["name"]:
            for what, where in entry.get(table, ()):
                ratios = _of_group(entry, where, result)
                if ratios:
                    yield {"what": what, "against": entry["against"], "ratios": ratios}


def _slower(row: Mapping[str, Any]) -> str:
    return f"{sum(ratio < 1 for ratio, _ in row['ratios'])} of {len(row['ratios'])}"


def command_of(name: str) -> str:
    """Return the benchmark that writes a result, with its flag for several GPUs."""
    return re.sub(r"_([248])$", r" -tp \1", name)


@cache
def page_of(name: str) -> str:
    """Return the page in docs/results that shows a result."""
    mark = f"<!-- result: {name} -->"
    pages = sorted((ROOT / "docs" / "results").glob("*.md"))
    return next(page.name for page in pages if mark in page.read_text("utf-8"))


def _range(row: Mapping[str, Any]) -> str:
    return " to ".join(three_digits(row["ratios"][index][0]) for index in (0, -1))


def headline(result: Result) -> str:
    """Return the least and the largest ratio of the first headline of a result, with a dash."""
    return _range(next(_rows("headline", result))).replace(" to ", "\N{EN DASH}")


_OF_PERFORMANCE = [
    ("what", "[{what}](results/{page})"),
    *(("against", "{against}"), ("ratio", _range), ("slower in", _slower), ("on", "{on}")),
    ("command", "`.venv/bin/python -m benchmarks.{command}`"),
]


def region(table: str, folder: Path = RESULTS) -> str:
    """Return a table of docs/performance.md, of all results that may be shown."""
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(entry["result"] for entry in RATIOS):
        path = folder / f"{name}.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        if result and not refusal(result):
            env = result["env"]
            on = env.get("gpu") or f"{env['cpu']}, {env['cpus']} cores"
            about = {"command": command_of(name), "on": on, "page": page_of(name)}
            rows += [row | about for row in _rows(table, result)]
    return "\n".join(Table(lambda _: rows, _OF_PERFORMANCE).lines({})) + "\n"


def drawn(name: str, result: Result) -> list[dict[str, Any]]:
    """Return the groups of a picture: times relative to ours, with their labels."""
    if name == "engine_cpu":
        return [_engine_group(case) for case in result["cases"]]
    if name == "gpu_engine":
        return [_gpu_engine_group(case) for case in result["cases"] if case["ratio"]]
    if name in LOADS:
        return list(_load_groups(result))
    sides, names = PICTURES[name]["sides"], PICTURES[name]["cases"]
    by_name = {case["case"]: case for case in result["cases"]}
    return [_group(sides, by_name[name]) for name in names if name in by_name]


def _group(sides: Mapping[str, Iterable[str]], case: Case) -> dict[str, Any]:
    """Return a case: ours, and the fastest label of each other side."""
    times = {label: time["p50"] for label, time in case["times"].items()}
    us = {OURS: times[case["ours"]]}
    for side, labels in sides.items():
        own = [times[label] for label in labels if label in times]
        if own:
            us[side] = min(own)
    return {
        "case": case["case"],
        "relative": {side: x / us[OURS] for side, x in us.items()},
        "text": {side: f"{three_digits(x)} us" for side, x in us.items()},
    }


def _engine_group(case: Case) -> dict[str, Any]:
    sides = {OURS: case["candidate"], "Hugging Face": case["baseline"]}
    rate = {name: side["tokens_per_s"] for name, side in sides.items()}
    return {
        "case": "{requests} x {prompt_tokens} + {new_tokens} tokens".format_map(case["case"]),
        "relative": dict(zip(sides, (1, case["ratio_p50"]), strict=True)),
        "text": {name: f"{three_digits(x)} tokens/s" for name, x in rate.items()},
    }


def _gpu_engine_group(case: Case) -> dict[str, Any]:
    values = {OURS: case["ours_value"], case["peer"]: case["peer_value"]}
    return {
        "case": case["case"],
        "relative": dict(zip(values, (1, case["ratio"]), strict=True)),
        "text": {name: f"{three_digits(x)} {case['unit']}" for name, x in values.items()},
    }


def _load_groups(result: Result) -> Iterator[dict[str, Any]]:
    """Yield a group for each load that has both ratios."""
    cases = {(case["lengths"], case["rate"], case["figure"]): case for case in result["cases"]}
    for lengths, rate in dict.fromkeys(key[:2] for key in cases):
        first, token = (cases[lengths, rate, figure] for figure in (_FIRST, _TOKEN))
        if first["ratio"] is None or token["ratio"] is None:
            continue
        ours = [f"{three_digits(case['ours_value'])} ms" for case in (first, token)]
        sides = {f"{case['peer']}, {case['figure']}": case for case in (first, token)}
        peers = {side: f"{three_digits(case['peer_value'])} ms" for side, case in sides.items()}
        yield {
            "case": f"{lengths}, {rate:g}/s",
            "relative": {OURS: 1} | {side: case["ratio"] for side, case in sides.items()},
            "text": {OURS: f"{ours[0]}, {ours[1]} a token"} | peers,
        }
