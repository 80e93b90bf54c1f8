"""The parts of docs/results that need more than a template; "@NAME" in shown.json names one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks._harness import three_digits
from benchmarks._render import Case, Column, Result, Table, labels_of


def texts(result: Result) -> Iterator[str]:
    """Where errors of FP8 caches were measured, and on what."""
    form = "{env[cpu]}, {env[cpus]} processors; paddlepaddle {env[paddlepaddle]}, numpy "
    form += "{env[numpy]}; commit {env[commit]:.12}. Texts of "
    lengths = ", ".join(map(str, result["texts"]))
    yield f"{form.format_map(result)}{lengths} tokens, {result['index_topk']} keys selected."


def _part_columns(result: Result) -> list[Column]:
    def column(case: Case) -> Column:
        def cell(part: str) -> str:
            us = [case["us"][x][part] for x in ("before", "fd_dsa") if x in case["us"]]
            return " → ".join(map(three_digits, us))

        return "{requests} x {context}, {sampling}".format_map(case), cell

    return [("part, us", lambda part: part), *map(column, result["cases"])]


step_parts = Table(lambda r: next(iter(r["cases"][0]["us"].values())), _part_columns)


def decode_counts(result: Result) -> Iterator[str]:
    """What a step does besides launches, and the ways that failed."""
    cases = result["cases"]
    for way in labels_of(cases):
        counted = [case["counted"][way] for case in cases if way in case["counted"]]
        names = sorted({name for found in counted for name in found if "bytes" not in name})
        counts = ", ".join(f"{max(found.get(n, 0) for found in counted)} {n}" for n in names)
        yield f"A step, {way}, at most: {counts.replace('_', ' ') or 'nothing beside launches'}."
    for way, why in result.get("failed", {}).items():
        yield f"Failed: {way} ({why})."


_VERDICTS = "same", "faster", "slower"


def _verdicts(result: Result) -> Iterator[dict[str, Any]]:
    """How many cases of each benchmark changed, and the smallest and largest change."""
    for name, entries in result["modules"].items():
        verdicts = [entry["verdict"] for entry in entries]
        ratios = sorted(entry["after_us"] / entry["before_us"] for entry in entries)
        found = {"of": name, "ratios": f"{ratios[0]:.2f} to {ratios[-1]:.2f}"}
        yield found | {verdict: verdicts.count(verdict) for verdict in _VERDICTS}


compared = Table(
    _verdicts,
    [
        *(("benchmark", "{of}"), ("after / before", "{ratios}")),
        *((f"cases {verdict}", f"{{{verdict}}}") for verdict in _VERDICTS),
    ],
)
changed = Table(
    lambda result: [
        entry | {"of": name}
        for name, entries in result["modules"].items()
        for entry in entries
        if entry["verdict"] != "same"
    ],
    [
        *(("benchmark", "{of}"), ("changed case", "{case}"), ("before, us", "{before_us:~}")),
        *(("after, us", "{after_us:~}"), ("verdict", "{verdict}")),
    ],
)


def stalls(kernel: Any) -> str:
    """The two reasons that a kernel's warps wait most for."""
    return ", ".join(list(kernel["stalls"])[:2]).replace("_", " ")


def missed(result: Result) -> Iterator[str]:
    """The largest share of a row's top k that inexact peers miss."""
    shares: dict[str, tuple[float, str]] = {}
    for case in result["cases"]:
        for label, right in case.get("share_right", {}).items():
            shares[label] = max(shares.get(label, (0.0, "")), (1 - right, case["case"]))
    if shares:
        found = [f"{k} up to {share:.1%} ({where})" for k, (share, where) in sorted(shares.items())]
        yield f"Scores chosen that are not among the best: {', '.join(found)}."


def stack_counts(result: Result) -> Iterator[str]:
    """Effects of the package's part of a step, the peers chosen, and what did not serve."""
    cases = result["cases"]
    counted = [case["package_alone"] for case in cases if "package_alone" in case]
    if counted:
        names = {"launches": "launches", "copies": "copies", "host_waits": "host waits"}
        names["allocations"] = "allocations"
        counts = ", ".join(f"{max(c[key] for c in counted)} {name}" for key, name in names.items())
        yield (
            f"A step without torch's GEMMs, which allocate their results, is at most {counts}"
            "; the columns above count whole eager steps."
        )
    made_by = {f"{what} by {who}" for case in cases for what, who in case["made_by"].items()}
    if made_by:
        yield f"The fastest of the peers, in one case or another: {', '.join(sorted(made_by))}."
    others = [name for name, serves in result.get("custom_ops", {}).items() if serves is not True]
    if others:
        yield f"Of custom_ops/ did not serve: {', '.join(others)}."


def unguarded(result: Result) -> Iterator[str]:
    """How many steps are read wrong without guards."""
    for case in result["cases"]:
        if case.get("unguarded"):
            found = "; ".join(f"{name}: {wrong}" for name, wrong in case["unguarded"].items())
            form = "{case} without guards, steps read wrong of {unguarded_steps}: "
            yield f"{form.format_map(case)}{found}."
