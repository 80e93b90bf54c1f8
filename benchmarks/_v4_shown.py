"""The tables of docs/results/v4_prepare.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks._harness import three_digits
from benchmarks._render import (
    Case,
    Column,
    Result,
    Table,
    ceilings_line,
    fill,
    labels_of,
    paragraphs,
)

Size = tuple[int, int, int]  # rows, thousands of context, drafts
_DRAFTS = (0, 1, 3)
_TITLES = {
    "host": "Host time of a step, us, with 0 / 1 / 3 drafts",
    "exposed": "Exposed time of a step, us, with 0 / 1 / 3 drafts",
    "device": "Device time, us, with 0 / 1 / 3 drafts",
}
# sides that ours is compared with, as the sentences name them
_OTHERS = {
    "loop": "the loop",
    "vectorised": "the vectorised form",
    "operators": "the operators",
    "operators, graph": "the operators in a graph",
}


def v4_prepare(result: Result) -> Iterator[str]:
    """Three tables over all sizes, the aims, what is faster than ours, and further figures."""
    cases = _Cases(result)
    for kind, title in _TITLES.items():
        own = [case for case in result["cases"] if case.get("kind") == kind]
        if own:
            yield from paragraphs(result, [f"{title}:", _size_table(own)])
    yield from paragraphs(result, [Table(lambda _: _aims(cases), _AIM_COLUMNS)])
    yield "Sizes at which another side takes less time than ours:"
    yield "\n".join(_faster_than_ours(cases))
    yield from _sentences(result)
    yield from ceilings_line(result)
    if "error" in result:
        yield f"The run was cut off: {result['error']}."


def _size_table(cases: Sequence[Case]) -> Table:
    """Rows and contexts down, sides across; a cell has the figures of all numbers of drafts."""
    ours, first = cases[0]["ours"], cases[0]
    columns: list[Column] = [("rows x context", lambda row: _size(row[0]))]

    def add(head: str, *path: str) -> None:
        def cell(row: Sequence[Case]) -> str:
            found = {case["drafts"]: _figure(case, *path) for case in row}
            figures = [found.get(drafts) for drafts in _DRAFTS]
            return " / ".join("-" if x is None else three_digits(x) for x in figures)

        columns.append((head, cell))

    for label in labels_of(cases):
        add(f"**{label}**" if label == ours else label, "times", label, "p50")
        if any(label in case.get("arrays_us", ()) for case in cases):
            add(f"{label}, arrays alone", "arrays_us", label, "p50")
    if "stage_and_expand_us" in first:
        add("`stage` and `expand` alone", "stage_and_expand_us", "p50")
    if "p99" in first["times"][ours]:
        add(f"{ours}, p99", "times", ours, "p99")
    if first["floor_us"]:
        add("of the floor, %", "percent_of_floor")
    columns.append(("tier", lambda row: row[0]["tier"]))
    rows: dict[tuple[int, int], list[Case]] = {}
    for case in sorted(cases, key=lambda c: (c["batch"], c["context"], c["drafts"])):
        rows.setdefault((case["batch"], case["context"]), []).append(case)
    return Table(lambda _: rows.values(), columns)


def _size(case: Case) -> str:
    return f"{case['batch']} x {case['context'] // 1024}k"


def _figure(case: Case, *path: str) -> float | None:
    """A figure of a case; None where it was not measured."""
    found = case
    for key in path:
        if key not in found:
            return None
        found = found[key]
    return found  # type: ignore[return-value]


class _Cases:
    """The figures of a result by kind and size."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self._cases = {
            (c["kind"], (c["batch"], c["context"] // 1024, c["drafts"])): c
            for c in result["cases"]
            if c.get("kind") in _TITLES
        }

    def sizes(self, kind: str) -> list[Size]:
        """All sizes of a kind."""
        return [size for of, size in self._cases if of == kind]

    def figure(self, kind: str, size: Size, *path: str) -> float | None:
        """A figure; None where it was not measured."""
        return _figure(self._cases.get((kind, size), {}), *path)

    def time(self, kind: str, size: Size, label: str = "ours") -> float | None:
        """Median of a side."""
        return self.figure(kind, size, "times", label, "p50")

    def ratio(self, kind: str, size: Size, label: str, ours: str = "ours") -> float | None:
        """How many times ours a side takes."""
        return _over(self.time(kind, size, label), self.time(kind, size, ours))


def _over(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


Aim = tuple[str, "float | None", float, bool]


def _aims(cases: _Cases) -> Iterator[Aim]:
    """Text of an aim, what was measured, the limit, and whether more is better."""
    host, device = cases.sizes("host"), cases.sizes("device")
    for what in ("launches", "copies"):
        found = _most(cases.figure("host", size, what) for size in host)
        yield f"{what} a step, all sizes: 1", found, 1, False
    for batch, limit in ((256, 60), (32, 35), (1, 25)):
        text = f"host time of `stage` and `expand` at {batch} x 8k, 3 drafts: at most {limit} us"
        yield text, cases.figure("host", (batch, 8, 3), "stage_and_expand_us", "p50"), limit, False
    growth = (
        _over(cases.time("host", (batch, 128, drafts)), cases.time("host", (batch, 8, drafts)))
        for batch, context, drafts in host
        if context == 8
    )
    yield "host time at 128k against 8k: at most 1.3x", _most(growth), 1.3, False
    small = [s for s in device if s[0] <= 128 and s[1] <= 8 and s[2] <= 1]
    slowest = _most(cases.time("device", size) for size in small)
    yield "launch alone, up to 128 x 8k, 1 draft: at most 8 us", slowest, 8, False
    largest = cases.time("device", (256, 128, 3))
    yield "launch alone, 256 x 128k, 3 drafts: at most 12 us", largest, 12, False
    exposed = _least(cases.ratio("exposed", (128, 8, drafts), "loop") for drafts in _DRAFTS)
    yield "exposed time at 128 x 8k, the loop's against ours: at least 50x", exposed, 50, True
    ratios = [
        (8, drafts, limit, "loop") for drafts, limit in zip(_DRAFTS, (10, 20, 40), strict=True)
    ]
    ratios += [(*x, "vectorised") for x in ((8, 0, 3), (128, 0, 20), (128, 3, 100))]
    for context, drafts, limit, label in ratios:
        text = f"host time at 128 x {context}k, {drafts} drafts, {_OTHERS[label]}'s against ours: "
        yield (
            f"{text}at least {limit}x",
            cases.ratio("host", (128, context, drafts), label),
            limit,
            True,
        )
    eager = _least(cases.ratio("device", size, "operators", "ours, eager") for size in device)
    yield "device, eager, the operators' against ours: at least 5x", eager, 5, True
    graph = _least(cases.ratio("device", size, "operators, graph") for size in device)
    yield "device, in graphs, the operators' against ours: at least 2x", graph, 2, True
    hidden = _figure(cases.result, "overlap", "ours", "median")
    percent = None if hidden is None else 100 * hidden
    yield "share of a step's copy beside work, median: at least 90%", percent, 90, True
    check = _figure(cases.result, "check_us", "p50")
    yield "checks of a step of 256 rows: at most 25 us", check, 25, False


def _measured(aim: Aim) -> str:
    return "not measured" if aim[1] is None else three_digits(aim[1])


def _met(aim: Aim) -> str:
    _, value, limit, at_least = aim
    if value is None:
        return ""
    return "yes" if (value >= limit if at_least else value <= limit) else "**no**"


_AIM_COLUMNS: list[Column] = [
    ("aim", lambda aim: aim[0]),
    ("measured", _measured),
    ("met", _met),
    ("tier", lambda aim: "" if aim[1] is None else "T1"),
]


def _sentences(result: Result) -> Iterator[str]:
    """What the cases without a table say."""
    for case in result["cases"]:
        if len(case.get("effects", ())) > 1:
            counts = (f"{k} {n['launches']} and {n['copies']}" for k, n in case["effects"].items())
            where = case["case"].removesuffix(", host")
            yield f"Launches and copies of a step at {where}: {', '.join(counts)}."
    for case in result["cases"]:
        if case.get("kind") == "table":
            where = case["case"].removesuffix(", table")
            yield f"In table mode, at {where}, no list is written: " + fill(
                "the launch takes {times[ours][p50]:~} us, the host {host_us[p50]:~} us, and all "
                "buffers together {allocated_bytes:/1048576:.1f} MiB, where the list alone would "
                "have {list_bytes:/1048576:.1f} MiB.",
                case,
            )
    for label, found in result.get("overlap", {}).items():
        plural = "copies" if found["copies"] > 1 else "copy"
        where = f" at {result['overlap_case']}" if "overlap_case" in result else ""
        yield f"{label[0].upper()}{label[1:]}{where}: of a step's {plural}, " + (
            "{median:.0%} ran beside work (median; {p5:.0%} at the 5th percentile), at least four "
            "fifths in {share_of_steps_above_80:.0%} of steps."
        ).format_map(found)


def _faster_than_ours(cases: _Cases) -> Iterator[str]:
    """A list of the sizes at which a side takes less time than ours."""
    for kind in ("host", "exposed"):
        for label, name in _OTHERS.items():
            ratios = {size: cases.ratio(kind, size, label) for size in cases.sizes(kind)}
            yield f"- {kind} time, {name}: {_sizes_below_one(ratios)}"
    for label in ("loop", "vectorised"):
        arrays = {
            s: cases.figure("host", s, "arrays_us", label, "p50") for s in cases.sizes("host")
        }
        ratios = {size: _over(us, cases.time("host", size)) for size, us in arrays.items()}
        yield (
            f"- {_OTHERS[label]}, its arrays alone without a copy to the device, against our host "
            f"time: {_sizes_below_one(ratios)}"
        )


def _sizes_below_one(ratios: Mapping[Size, float | None]) -> str:
    """The sizes at which a ratio is below one, in words."""
    found = [size for size, ratio in ratios.items() if (ratio or 1) < 1]
    if len(found) in (0, len(ratios)):
        return "all" if found else "none"
    by_size: dict[tuple[int, int], list[str]] = {}
    for batch, context, drafts in sorted(found):
        by_size.setdefault((batch, context), []).append(str(drafts))
    parts = (f"{b} x {c}k ({', '.join(drafts)} drafts)" for (b, c), drafts in by_size.items())
    return ", ".join(parts)
