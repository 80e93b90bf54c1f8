"""Results as Markdown: templates over the JSON, tables, and the parts that GPU results share.

shown.json lists the parts of each result, with an empty line between them:

    "text {a[b]:~}"       a template over the result; numbers are formatted as _Number says
    ["piece", "piece"]    pieces of one paragraph
    "@NAME"               a function of the result in this module, _notes or _v4_shown
    {"rows": PATH, "columns": [[HEAD, CELL], ...]}    a table

A PATH is "a.b.*": "*" takes every item, with its name as "key" and the fields of what holds it. A
CELL is a template of the row, or "@NAME"; it is empty where the row has no such figure, and a
column without any figure is left out. {"each": PATH, "columns": [...]} makes columns for every name
at PATH, which replaces "$"; "@NAME" makes columns of the whole result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks._harness import table_row, three_digits

Result: TypeAlias = Mapping[str, Any]
Case: TypeAlias = Mapping[str, Any]
# head and cell of a column; a cell is a template of the row, or a function of it
Column: TypeAlias = tuple[str, "str | Callable[[Any], str]"]
Part: TypeAlias = "str | Table | Callable[[Result], Iterable[str]]"


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


class _Fields(dict[Any, Any]):
    """An object of a result; a template looks up "1" as the number 1."""

    def __missing__(self, key: Any) -> Any:
        if isinstance(key, int):
            return self[str(key)]
        raise KeyError(key)


def load(path: Path) -> dict[str, Any]:
    """A result, its numbers ready for templates."""
    options: dict[str, Any] = {"parse_float": Figure, "parse_int": Count, "object_hook": _Fields}
    return json.loads(path.read_text(), **options)


def rows_at(value: Any, path: str, held: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """The items at a path of a result, as the module's docstring describes it."""
    first, _, rest = path.partition(".")
    if not path:
        yield from [held] if held is not None else value
    elif first == "*":
        items = enumerate(value) if isinstance(value, Sequence) else value.items()
        for key, item in items:
            fields = item if isinstance(item, Mapping) else {}
            yield from rows_at(item, rest, {**(held or {}), "key": key, **fields})
    else:
        yield from rows_at(value[int(first) if first.isdigit() else first], rest, held)


@dataclass(frozen=True)
class Table:
    """A table of Markdown.

    Attributes:
        rows: their path in the result, or a function of the result.
        columns: of every row, or a function of the result.
    """

    rows: str | Callable[[Result], Iterable[Any]]
    columns: Sequence[Column] | Callable[[Result], Sequence[Column]]

    def lines(self, result: Result) -> list[str]:
        """The lines of the table."""
        columns = self.columns(result) if callable(self.columns) else self.columns
        rows = rows_at(result, self.rows) if isinstance(self.rows, str) else self.rows(result)
        cells = [[_text(cell, row) for _, cell in columns] for row in rows]
        held = [n for n in range(len(columns)) if any(row[n] for row in cells)]
        table = [[name for name, _ in columns], *cells]
        head, *lines = (table_row([row[n] for n in held]) for row in table)
        return [head, "|---" * len(held) + "|", *lines]


def _text(cell: str | Callable[[Any], str], row: Any) -> str:
    """A cell; empty where the row has no such figure."""
    try:
        return cell(row) if callable(cell) else cell.format_map(row)
    except KeyError:
        return ""


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


def sides(result: Result) -> list[Column]:
    """A column a side: its median in microseconds, and how many times ours another side takes."""

    def cell(case: Case, label: str) -> str:
        time = three_digits(case["times"][label]["p50"])
        ours = label == case["ours"]
        return f"**{time}**" if ours else f"{time} ({three_digits(case['ratios'][label])}x)"

    return [(f"{label}, us", partial(cell, label=label)) for label in labels_of(result["cases"])]


def _floor_cell(case: Case) -> str:
    share = case["percent_of_floor"]
    return f"{share:.0f}%" if share >= 1 else "< 1%"


def _times_columns(result: Result) -> list[Column]:
    return [
        ("case", "{case}"),
        *sides(result),
        ("of the floor", _floor_cell),
        ("launches", "{launches}"),
        ("host waits", "{host_waits}"),
        ("allocations", "{allocations}"),
        ("tier", "{tier}"),
    ]


def times(result: Result) -> Iterator[str]:
    """All cases and sides of a GPU result, the errors, and what was not measured."""
    cases = result["cases"]
    if cases:
        yield from paragraphs(result, [gpu_machine, Table("cases", _times_columns)])
        every = [t for case in cases for t in case["times"].values()]
        spread = max((t["p80"] - t["p20"]) / t["p50"] for t in every)
        yield f"{next(ceilings_line(result))} Largest spread, p20 to p80: {spread:.1%}."
    else:
        yield "No case was timed."
    errors: dict[str, float] = {}
    left_out = {}
    for case in cases:
        for label, found in case.get("errors", {}).items():
            error = found["attention"] if isinstance(found, Mapping) else found
            errors[label] = max(errors.get(label, 0.0), error)
        left_out |= case.get("left_out", {})
    if errors:
        largest = ", ".join(f"{label} {error:.1e}" for label, error in errors.items())
        yield f"Largest error against sums in doubles, relative: {largest}."
    if left_out:
        yield f"Left out: {', '.join(f'{k} ({why})' for k, why in sorted(left_out.items()))}."
    if result.get("failed"):
        yield f"Failed: {', '.join(result['failed'])}."
    if result.get("not_run"):
        yield f"Not run, for want of time: {', '.join(result['not_run'])}."
    if "error" in result:
        yield f"The run was cut off: {result['error']}."
