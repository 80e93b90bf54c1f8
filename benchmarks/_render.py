"""Results as Markdown: templates over the JSON, tables, and the parts of all GPU results.

shown.json lists the parts of each result, with an empty line between them. The name of another
result stands for the parts of that one:

    "text {a[b]:~}"       a template over the result, see `fill`
    ["piece", "piece"]    pieces of one paragraph
    "@NAME"               a function of the result, in FUNCTIONS
    {"rows": PATH, "columns": [[HEAD, CELL], ...]}    a table

A PATH is "a.b.*": "*" takes every item, with its name as "key" and the fields of what holds it. A
CELL is a template of the row, or "@NAME". It is empty if the row has no such figure. A column
without figures is omitted. {"each": PATH, "columns": [...]} makes columns for every name at PATH,
which replaces "$"; "@NAME" makes columns of the whole result.

    {"grid": PATH, "by": [HEAD, LABEL], "cells": [[HEAD, CELL], ...]}    a table of two directions

Rows at PATH with the same LABEL share a line. HEAD may be a template that makes columns. "match" is
a pattern of the row's "case" (or of the template "of"). Its groups are fields, and other rows are
omitted. With "peers", some labels of "times", a row also has ours_us, peer (the fastest of them)
and its ratio peer_ratio.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from string import Formatter
from typing import Any, TypeAlias

from benchmarks._harness import table_row, three_digits

Result: TypeAlias = Mapping[str, Any]
Case: TypeAlias = Mapping[str, Any]
# head and cell of a column; a cell is a template of the row, or a function of it
Column: TypeAlias = tuple[str, "str | Callable[[Any], str]"]
Drawn: TypeAlias = "Table | Grid"
Part: TypeAlias = "str | list[Any] | Mapping[str, Any] | Drawn | Callable[[Result], Iterable[str]]"
FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What "@NAME" of shown.json may name; the modules of the parts add theirs."""


class _Templates(Formatter):
    """The formatter of the templates, as described in `fill`."""

    def get_field(self, field_name: str, args: Any, row: Any) -> tuple[Any, str]:
        """Return the value of a name such as a[b][0] or a[b=text]. Functions are called."""
        value = row
        for key in re.findall(r"[^\[\]]+", field_name):
            if isinstance(value, Mapping):
                value = value[key]
            else:
                value = _selected(value, key) if "=" in key else value[int(key)]
            value = value() if callable(value) else value
        return value, field_name

    def format_field(self, value: Any, form: str) -> str:
        """Format a value."""
        if form[:1] in ("/", "?"):
            word, _, rest = form[1:].partition(":")
            if form[0] == "/":
                return self.format_field(value / float(word), rest)
            return self.format_field(value, rest) if value else word
        return three_digits(value) if form == "~" else format(value, form)


def _selected(items: Sequence[Any], condition: str) -> Any:
    """Return the only item with these values, written `a=1&b.c=text`.

    Raises:
        KeyError: no item, or more than one, has them.
    """
    wanted = [part.split("=", 1) for part in condition.split("&")]
    found = [
        item
        for item in items
        if all(str(reduce(lambda x, k: x[k], key.split("."), item)) == v for key, v in wanted)
    ]
    if len(found) != 1:
        raise KeyError(f"{len(found)} items have {condition}")
    return found[0]


def fill(template: str, row: Any) -> str:
    """Fill a template with the figures of a row.

    {x:~} has three digits, and {x:/1e12:.2f} is in units of 1e12. {x:?-:g} is "-" if x is 0. Other
    forms are those of `format`. {a[b=text]} selects the only item of the list a whose b is text.

    Raises:
        KeyError: the row has no such figure.
    """
    return _Templates().vformat(template, (), row)


def rows_at(value: Any, path: str, held: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """Yield the items at a path of a result, as the module's docstring describes it."""
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
        columns: columns as in shown.json, or a function of the result.
    """

    rows: str | Callable[[Result], Iterable[Any]]
    columns: Sequence[Any] | Callable[[Result], Sequence[Column]]

    def lines(self, result: Result) -> list[str]:
        """Return the lines of the table."""
        columns = list(self._columns(result))
        rows = rows_at(result, self.rows) if isinstance(self.rows, str) else self.rows(result)
        cells = [[_text(cell, row) for _, cell in columns] for row in rows]
        held = [n for n in range(len(columns)) if any(row[n] for row in cells)]
        table = [[name for name, _ in columns], *cells]
        head, *lines = (table_row([row[n] for n in held]) for row in table)
        return [head, "|---" * len(held) + "|", *lines]

    def _columns(self, result: Result) -> Iterator[Column]:
        """Yield the columns, also those that are made for each name."""
        for column in self.columns(result) if callable(self.columns) else self.columns:
            if isinstance(column, str):
                yield from FUNCTIONS[column[1:]](result)
            elif isinstance(column, Mapping):
                for row in rows_at(result, f"{column['each']}.*"):
                    for head, cell in column["columns"]:
                        yield head.replace("$", row["key"]), cell.replace("$", row["key"])
            else:
                yield tuple(column)


@dataclass(frozen=True)
class Grid:
    """A table with lines and columns by two properties of the rows.

    Attributes:
        grid: path of the rows in the result.
        by: head of the first column, and template of a line's label.
        cells: head and cell of each column, both templates of the row.
        match: pattern of `of` with groups as fields; "" takes all rows.
        of: template of the text that `match` reads.
        peers: labels of "times" of which the fastest counts.
    """

    grid: str
    by: tuple[str, str]
    cells: Sequence[tuple[str, str]]
    match: str = ""
    of: str = "{case}"
    peers: Sequence[str] = ()

    def lines(self, result: Result) -> list[str]:
        """Return the lines of the table."""
        table: dict[str, dict[str, str]] = {}
        heads: dict[str, None] = {}
        for row in self._rows(result):
            line = table.setdefault(fill(self.by[1], row), {})
            for head, cell in self.cells:
                if text := _text(cell, row):
                    line[name := fill(head, row)] = text
                    heads[name] = None
        shown = [[label, *(line.get(head, "") for head in heads)] for label, line in table.items()]
        head, *lines = (table_row(line) for line in [[self.by[0], *heads], *shown])
        return [head, "|---" * (1 + len(heads)) + "|", *lines]

    def _rows(self, result: Result) -> Iterator[Mapping[str, Any]]:
        """Yield the rows that match, with the fields of the match and of the fastest peer."""
        for row in rows_at(result, self.grid):
            found = re.fullmatch(self.match, fill(self.of, row)) if self.match else None
            if self.match and found is None:
                continue
            fields = {**row, **(found.groupdict() if found else {})}
            us = {label: time["p50"] for label, time in row.get("times", {}).items()}
            if own := [label for label in self.peers if label in us]:
                fields["ours_us"] = us[row["ours"]]
                fields["peer"] = min(own, key=us.__getitem__)
                fields["peer_ratio"] = us[fields["peer"]] / fields["ours_us"]
            yield fields


def _text(cell: str | Callable[[Any], str], row: Any) -> str:
    """Return the text of a cell, "" if the row has no such figure."""
    if isinstance(cell, str) and cell.startswith("@"):
        cell = FUNCTIONS[cell[1:]]
    try:
        return cell(row) if callable(cell) else fill(cell, row)
    except KeyError:
        return ""


def paragraphs(result: Result, parts: Iterable[Part]) -> Iterator[str]:
    """Yield the paragraphs of a result, one or more for each part."""
    for part in parts:
        if isinstance(part, str) and part.startswith("@"):
            part = FUNCTIONS[part[1:]]
        if isinstance(part, Mapping):
            part = Grid(**part) if "grid" in part else Table(part["rows"], part["columns"])
        if isinstance(part, Table | Grid):
            yield "\n".join(part.lines(result))
        elif isinstance(part, list):
            yield "".join(paragraphs(result, part))
        elif isinstance(part, str):
            yield fill(part, result)
        else:
            yield from part(result)


def cpu_machine(result: Result) -> Iterator[str]:
    """Yield machine and commits of a result on a CPU."""
    before = ", before: {baseline[commit]:.12}." if "baseline" in result else "."
    form = "{env[date]}, {env[cpu]}, {env[cpus]} processors; Python {env[python]}, "
    form += "paddlepaddle {env[paddlepaddle]}; commit {env[commit]:.12}" + before
    yield fill(form, result)


def gpu_machine(result: Result) -> Iterator[str]:
    """Yield machine, versions and commit of a GPU result."""
    env = result["env"]
    packages = [f"{x} {env[x]}" for x in ("torch", "triton", "paddlepaddle") if env.get(x)]
    yield (
        f"{env.get('date', '')}, {env['gpu']}, driver {env['driver']}; Python {env['python']}, "
        f"{', '.join(packages)}; commit {env['commit'][:12]}."
    )


def refusal(result: Result) -> str | None:
    """Return the reason why a GPU result may not be shown, or None if it may."""
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
    """The ceilings of the run, and the clocks before and after it."""
    line = "In the same run: copy {copy_bytes_per_s:/1e12:.2f} TB/s read and written, an empty "
    line += "kernel in a graph {node_us:.2f} us"
    found = [
        f"{when} {c['clocks.sm']} and {c['power.draw']}"
        for when, c in zip(("before", "after"), result["clocks"], strict=False)
        if "clocks.sm" in c
    ]
    clocks = f"; SM clock and power {', '.join(found)}" if found else ""
    yield f"{fill(line, result['ceilings'])}{clocks}."


def labels_of(cases: Iterable[Case]) -> list[str]:
    """Return the sides of some cases, in the order in which they appear."""
    return list(dict.fromkeys(label for case in cases for label in case["times"]))


def sides(result: Result) -> list[Column]:
    """Return a column for each side: its median in us, and its ratio to ours."""

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
    """Yield all cases, sides and errors of a GPU result, and the missing cases."""
    if result["cases"]:
        yield from paragraphs(result, [gpu_run, Table("cases", _times_columns)])
    yield from run_notes(result)


def gpu_run(result: Result) -> Iterator[str]:
    """Machine, ceilings and largest spread of a GPU result, in one paragraph."""
    parts = [*gpu_machine(result)]
    if result["cases"]:
        every = [t for case in result["cases"] for t in case["times"].values()]
        spread = max((t["p80"] - t["p20"]) / t["p50"] for t in every)
        parts += [*ceilings_line(result), f"Largest spread, p20 to p80: {spread:.1%}."]
    yield " ".join(parts)


def run_notes(result: Result) -> Iterator[str]:
    """Errors of a GPU result, and the cases without a time."""
    cases = result["cases"]
    if not cases:
        yield "No case was timed."
    errors: dict[str, float] = {}
    left_out = {}
    for case in cases:
        for label, found in case.get("errors", {}).items():
            errors[label] = max(errors.get(label, 0.0), found)
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
