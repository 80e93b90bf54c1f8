"""Parts of docs/results that need more than a template. shown.json names them by "@NAME"."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks._harness import RESULTS, three_digits
from benchmarks._render import Case, Column, Result, Table, labels_of


def texts(result: Result) -> Iterator[str]:
    """Yield the machine and the texts of the errors of FP8 caches."""
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
    """Yield the counts of a step's other work, and the ways that failed."""
    cases = result["cases"]
    for way in labels_of(cases):
        counted = [case["counted"][way] for case in cases if way in case["counted"]]
        names = sorted({name for found in counted for name in found if "bytes" not in name})
        counts = ", ".join(f"{max(found.get(n, 0) for found in counted)} {n}" for n in names)
        yield f"A step, {way}, at most: {counts.replace('_', ' ') or 'nothing beside launches'}."
    for way, why in result.get("failed", {}).items():
        yield f"Failed: {way} ({why})."


def stalls(kernel: Any) -> str:
    """Return the two largest reasons for which a kernel's warps wait."""
    return ", ".join(list(kernel["stalls"])[:2]).replace("_", " ")


def longest_launches(result: Result) -> Iterator[str]:
    """Yield the longest profiled launch of each kernel."""

    def duration(kernel: Case) -> float:
        return float(kernel["metrics"]["duration"].split()[0].replace(",", ""))

    longest: dict[str, Case] = {}
    for kernel in result["kernels"]:
        before = longest.get(kernel["kernel"])
        if before is None or duration(kernel) > duration(before):
            longest[kernel["kernel"]] = kernel
    columns: list[Column] = [("kernel", "`{kernel}`")]
    for head in ("duration", "registers a thread", "occupancy reached", "L2 hits"):
        columns.append((head, f"{{metrics[{head}]}}"))
    table = Table(lambda _: longest.values(), [*columns, ("waits most for", stalls)])
    yield "\n".join(table.lines(result))


def siege_table() -> str:
    """Return the table of docs/results/reliability.md: each kind of request on three servers."""
    names = ("siege_demo", "siege_large", "siege_busy", "siege_before")
    demo, large, busy, before = (
        json.loads((RESULTS / "soak" / f"{name}.json").read_text()) for name in names
    )
    form = "{env[cpu]}, {env[cpus]} processors; Python {env[python]}, paddlepaddle "
    form += "{env[paddlepaddle]}; commits "
    commits = ", ".join(f"{r['env']['commit']:.12}" for r in (demo, large, busy))
    repeats = ", ".join(str(r["repeats"]) for r in (demo, large, busy))
    found = [{row["requests"]: row for row in r["rows"]} for r in (demo, large, busy, before)]
    figures = [key for key in demo["rows"][0] if key not in ("requests", "answers")]

    def cell(row: Case, key: str) -> str:
        values = [rows[row["requests"]][key].partition(" ")[0] for rows in found[:3]]
        return " / ".join(values)

    def earlier(row: Case) -> str:
        old = found[3].get(row["requests"], {})
        return " / ".join(old[key].partition(" ")[0] for key in figures[:3]) if old else ""

    def answers(row: Case) -> str:
        # the others are named if their kinds of answers differ
        each = [rows[row["requests"]]["answers"] for rows in found[:3]]
        kinds = [re.sub(r": \d+", "", text) for text in each]
        others = zip(("large", "busy"), kinds[1:], each[1:], strict=True)
        return "; ".join([each[0], *(f"{k}: {text}" for k, x, text in others if x != kinds[0])])

    columns: list[Column] = [("requests", "{requests}"), ("answers", answers)]
    columns += [(key.replace(" (alone)", ""), partial(cell, key=key)) for key in figures]
    columns.append(("before: /health / gap / memory", earlier))
    table = "\n".join(Table(lambda _: demo["rows"], columns).lines({}))
    return f"{form.format_map(demo)}{commits}; the worst of {repeats}.\n\n{table}\n"


def missed(result: Result) -> Iterator[str]:
    """Yield the largest share of a row's top k that inexact peers miss."""
    shares: dict[str, tuple[float, str]] = {}
    for case in result["cases"]:
        for label, right in case.get("share_right", {}).items():
            shares[label] = max(shares.get(label, (0.0, "")), (1 - right, case["case"]))
    if shares:
        found = [f"{k} up to {share:.1%} ({where})" for k, (share, where) in sorted(shares.items())]
        yield f"Scores chosen that are not among the best: {', '.join(found)}."


def unguarded(result: Result) -> Iterator[str]:
    """Yield the number of steps that were read wrong without guards."""
    for case in result["cases"]:
        if case.get("unguarded"):
            found = "; ".join(f"{name}: {wrong}" for name, wrong in case["unguarded"].items())
            form = "{case} without guards, steps read wrong of {unguarded_steps}: "
            yield f"{form.format_map(case)}{found}."
