"""Results as Markdown: templates over the JSON, tables, and the parts that GPU results share.

A result is shown as paragraphs with an empty line between them. What each benchmark shows is
described in shown.json: a paragraph is a template, a table ("rows", where they are in the result,
and "columns", head and template of a cell), or "@" and the name of a function of the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks._harness import table_row, three_digits

Result: TypeAlias = Mapping[str, Any]
Case: TypeAlias = Mapping[str, Any]
# head and cell of a column; a cell is a template of the row, or a function of it
Column: TypeAlias = tuple[str, "str | Callable[[Any], str]"]
Part: TypeAlias = "str | Table | Callable[[Result], Iterable[str]]"
# whole numbers of a case which are shown beside its times
COUNTS = {"launches": "launches", "host_waits": "host waits", "allocations": "allocations"}


class _Number:
    """A number in a template.

    {x:~} has three digits, {x:/1e12:.2f} is in units of 1e12, {x:?none:g} is "none" where x is 0.
    """

    def __format__(self, form: str) -> str:
        if form.startswith("/"):
            unit, _, rest = form[1:].partition(":")
            return format(Figure(self / float(unit)), rest)  # type: ignore[operator]
        if form.startswith("?"):
            text, _, rest = form[1:].partition(":")
            return format(self, rest) if self else text
        return three_digits(self) if form == "~" else super().__format__(form)  # type: ignore


class Figure(_Number, float):
    """A number of a result."""


class Count(_Number, int):
    """A whole number of a result."""


def load(path: Path) -> dict[str, Any]:
    """A result, its numbers ready for templates."""
    return json.loads(path.read_text(), parse_float=Figure, parse_int=Count)


@dataclass(frozen=True)
class Table:
    """A table of Markdown.

    Attributes:
        rows: where they are in the result (a.b), or a function of the result.
        columns: of every row, or a function of the result.
    """

    rows: str | Callable[[Result], Iterable[Any]]
    columns: Sequence[Column] | Callable[[Result], Sequence[Column]]

    def lines(self, result: Result) -> list[str]:
        """The lines of the table."""
        columns = self.columns(result) if callable(self.columns) else self.columns
        if isinstance(self.rows, str):
            rows = reduce(getitem, self.rows.split("."), result)
        else:
            rows = self.rows(result)
        cells = [[_text(cell, row) for _, cell in columns] for row in rows]
        head = table_row([name for name, _ in columns])
        return [head, "|---" * len(columns) + "|", *map(table_row, cells)]


def _text(cell: str | Callable[[Any], str], row: Any) -> str:
    return cell(row) if callable(cell) else cell.format_map(row)


def paragraphs(result: Result, parts: Iterable[Part]) -> Iterator[str]:
    """What the parts say of a result."""
    for part in parts:
        if isinstance(part, Table):
            yield "\n".join(part.lines(result))
        elif callable(part):
            yield from part(result)
        else:
            yield part.format_map(result)


def cpu_machine(result: Result) -> Iterator[str]:
    """Where a result on a CPU was taken, with the commits."""
    before = ", before: {baseline[commit]:.12}." if "baseline" in result else "."
    form = "{env[date]}, {env[cpu]}, {env[cpus]} processors; Python {env[python]}, "
    form += "paddlepaddle {env[paddlepaddle]}; commit {env[commit]:.12}" + before
    yield form.format_map(result)


def gpu_machine(result: Result) -> Iterator[str]:
    """Where and on what a GPU result was taken."""
    env = result["env"]
    packages = [f"{x} {env[x]}" for x in ("torch", "triton", "paddlepaddle") if env.get(x)]
    yield (
        f"{env.get('date', '')}, {env['gpu']}, driver {env['driver']}; Python {env['python']}, "
        f"{', '.join(packages)}; commit {env['commit'][:12]}."
    )


def refusal(result: Result) -> str | None:
    """Why the figures of a GPU result may not be shown; None where they may."""
    if "gate" not in result:
        return None
    # the ceilings run no kernel of ours
    if result["gate"] != "passed" and result["name"] != "ceilings":
        return f"The correctness tests of this run: {result['gate']}. No figures."
    if result["env"].get("form", "real") != "real":
        return "Measured without a GPU, to try the commands. No figures."
    return (
        "The tree that was measured is no commit. No figures." if result["env"]["dirty"] else None
    )


def ceilings_line(result: Result) -> Iterator[str]:
    """The ceilings of the run, the clocks as they were found, and the largest spread."""
    line = "In the same run: copy {copy_bytes_per_s:/1e12:.2f} TB/s read and written, an empty "
    line += "kernel in a graph {node_us:.2f} us"
    found = [
        f"{when} {c['clocks.sm']} and {c['power.draw']}"
        for when, c in zip(("before", "after"), result["clocks"], strict=False)
        if "clocks.sm" in c
    ]
    clocks = f"; SM clock and power {', '.join(found)}" if found else ""
    yield f"{line.format_map(result['ceilings'])}{clocks}."


def labels_of(cases: Iterable[Case]) -> list[str]:
    """The sides of some cases, in the order in which they appear."""
    return list(dict.fromkeys(label for case in cases for label in case["times"]))


def time_cell(label: str) -> Callable[[Case], str]:
    """A side's median in microseconds; for another side also how many times ours it is."""

    def cell(case: Case) -> str:
        if label not in case["times"]:
            return ""
        time = three_digits(case["times"][label]["p50"])
        if label == case["ours"]:
            return f"**{time}**"
        return f"{time} ({three_digits(case['ratios'][label])}x)"

    return cell


def _floor_cell(case: Case) -> str:
    share = case["percent_of_floor"]
    return f"{share:.0f}%" if share >= 1 else "< 1%"


def _times_columns(result: Result) -> list[Column]:
    cases = result["cases"]
    counts = [key for key in COUNTS if any(key in case for case in cases)]
    return [
        ("case", "{case}"),
        *((f"{label}, us", time_cell(label)) for label in labels_of(cases)),
        ("of the floor", _floor_cell),
        *((COUNTS[key], lambda case, key=key: str(case.get(key, ""))) for key in counts),
        ("tier", "{tier}"),
    ]


def times(result: Result) -> Iterator[str]:
    """All cases and sides of a GPU result, with what was not measured."""
    cases = result["cases"]
    if cases:
        yield from paragraphs(result, [gpu_machine, Table("cases", _times_columns)])
        every = [t for case in cases for t in case["times"].values()]
        spread = max((t["p80"] - t["p20"]) / t["p50"] for t in every)
        yield f"{next(ceilings_line(result))} Largest spread, p20 to p80: {spread:.1%}."
    else:
        yield "No case was timed."
    yield from gaps(result)


def gaps(result: Result) -> Iterator[str]:
    """The cases that are not in a table, and why."""
    if result.get("failed"):
        yield f"Failed: {', '.join(result['failed'])}."
    if result.get("not_run"):
        yield f"Not run, for want of time: {', '.join(result['not_run'])}."
    if "error" in result:
        yield f"The run was cut off: {result['error']}."


def largest_errors(cases: Iterable[Case], name: str = "") -> str:
    """The largest error of each side, "" if none was measured."""
    errors: dict[str, float] = {}
    for case in cases:
        for label, found in case["errors"].items():
            errors[label] = max(errors.get(label, 0.0), found[name] if name else found)
    return ", ".join(f"{label} {error:.1e}" for label, error in errors.items())


def left_out(cases: Iterable[Case]) -> Iterator[str]:
    """The sides that could not be measured, and why."""
    found = {f"{k} ({why})" for case in cases for k, why in case.get("left_out", {}).items()}
    if found:
        yield f"Left out: {', '.join(sorted(found))}."
