"""Parts of docs/results that need more than a template. shown.json names them by "@NAME"."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from operator import itemgetter

from benchmarks._harness import RESULTS, three_digits
from benchmarks._render import Case, Column, Result, Table, fill


def of_before(case: Case) -> str:
    """Return the milliseconds of a step of this package over those of the package before."""
    now, before = (case["sides"][label]["ms"]["p50"] for label in ("fd_dsa", "before"))
    return f"{now / before:.2f}"


def load_cell(case: Case) -> str:
    """Return a figure of a load: ours, the peer's, and their ratio, as far as they are there."""
    ours, peer = (
        "none" if value is None else three_digits(value)
        for value in (case["ours_value"], case["peer_value"])
    )
    text = ours if "peer_taken" not in case else f"{ours}, {peer}"
    return text if case["ratio"] is None else f"{text} ({case['ratio']:.2f}x)"


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


_SERVERS = {
    "siege_demo": "demo model",
    "siege_large": "`--large`",
    "siege_busy": "demo model, all processors busy",
    "siege_before": "demo model, before the limits",
}


def _worst(figure: str) -> float:
    """Return a figure as a number. A server that did not end has "none"."""
    return math.inf if figure == "none" else float(figure)


def siege_table(bounds: Sequence[float]) -> str:
    """Return the table of docs/results/reliability.md: bounds, and the worst of each server.

    Args:
        bounds: the largest allowed figures, in the order of a row of the results.
    """
    rows: list[dict[str, str]] = []
    for name, server in _SERVERS.items():
        result = json.loads((RESULTS / "soak" / f"{name}.json").read_text())
        env = result["env"]
        row = {"server": server, "processor": env["cpu"], "commit": env["commit"][:12]}
        row["kinds x repeats"] = f"{len(result['rows'])} x {result['repeats']}"
        figures = [key for key in result["rows"][0] if key not in ("requests", "answers")]
        for key in figures:
            found = (kind[key].partition(" ")[0] for kind in result["rows"])
            row[key] = max(found, key=_worst)
        rows.append(row)
    allowed = dict(zip(figures, (f"{bound:g}" for bound in bounds), strict=True))
    rows.insert(0, dict.fromkeys(row, "") | {"server": "allowed"} | allowed)
    columns: list[Column] = [(key.replace(" (alone)", ""), itemgetter(key)) for key in row]
    machine = "{env[cpus]} processors; Python {env[python]}, paddlepaddle "
    machine += "{env[paddlepaddle]}. The worst of all kinds of requests:"
    table = "\n".join(Table(lambda _: rows, columns).lines({}))
    return f"{fill(machine, result)}\n\n{table}\n"


def unguarded(result: Result) -> Iterator[str]:
    """Return how many steps are read wrong without guards, by way to the device."""
    found = [
        f"{case['case']} {'; '.join(f'{name} {n}' for name, n in case['unguarded'].items())}"
        for case in result["cases"]
        if case.get("unguarded")
    ]
    if found:
        steps = result["cases"][0]["unguarded_steps"]
        yield f"Steps read wrong without guards, of {steps}: {'. '.join(found)}."
