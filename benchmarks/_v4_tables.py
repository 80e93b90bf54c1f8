"""What docs/performance.md shows of the V4 preparation and of staged copies, from their JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks._harness import table_row, three_digits

Result = Mapping[str, Any]
Case = Mapping[str, Any]
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


def v4_prepare_tables(result: Result) -> list[str]:
    """Lines: three tables over all sizes, the aims, and what is slower or faster than ours."""
    lines: list[str] = []
    for kind, title in _TITLES.items():
        cases = [case for case in result["cases"] if case.get("kind") == kind]
        if cases:
            lines += ["", f"{title}:", "", *_size_table(cases)]
    lines += ["", *_aims_table(result), "", *_faster_than_ours(_Cases(result))]
    for sentence in _sentences(result):
        lines += ["", sentence]
    return lines


def _size_table(cases: Sequence[Case]) -> list[str]:
    """Rows and contexts down, sides across; a cell has the medians of all numbers of drafts."""
    found = {(c["batch"], c["context"], c["drafts"]): c for c in cases}
    ours = cases[0]["ours"]
    labels = list(dict.fromkeys(label for case in cases for label in case["times"]))
    columns: dict[str, Callable[[Case], float | None]] = {}
    for label in labels:
        columns[f"**{label}**" if label == ours else label] = _median_of(label)
        if any(label in case.get("arrays_us", ()) for case in cases):
            columns[f"{label}, arrays alone"] = _arrays_of(label)
    if "stage_and_expand_us" in cases[0]:
        columns["`stage` and `expand` alone"] = lambda case: case["stage_and_expand_us"]["p50"]
    if "p99" in cases[0]["times"][ours]:
        columns[f"{ours}, p99"] = lambda case: case["times"][ours]["p99"]
    if cases[0]["floor_us"]:
        columns["of the floor, %"] = lambda case: case["percent_of_floor"]
    head = ["rows x context", *columns, "tier"]
    lines = [table_row(head), "|---" * len(head) + "|"]
    for batch, context in sorted({key[:2] for key in found}):
        row = [found.get((batch, context, drafts)) for drafts in _DRAFTS]
        cells = [" / ".join(_figure(case, value) for case in row) for value in columns.values()]
        tier = next(case["tier"] for case in row if case)
        lines.append(table_row([_size(batch, context), *cells, tier]))
    return lines


def _median_of(label: str) -> Callable[[Case], float | None]:
    return lambda case: case["times"].get(label, {}).get("p50")


def _arrays_of(label: str) -> Callable[[Case], float | None]:
    return lambda case: case.get("arrays_us", {}).get(label, {}).get("p50")


def _figure(case: Case | None, value: Callable[[Case], float | None]) -> str:
    """A figure of a case; a dash where there is none."""
    found = value(case) if case else None
    return "-" if found is None else three_digits(found)


def _size(batch: int, context: int) -> str:
    return f"{batch} x {context // 1024}k"


def _aims_table(result: Result) -> list[str]:
    """What was aimed at, what was measured, and whether that is met."""
    lines = [table_row(["aim", "measured", "met", "tier"]), "|---|---|---|---|"]
    for aim, value, limit, at_least in _aims(_Cases(result)):
        if value is None:
            lines.append(table_row([aim, "not measured", "", ""]))
            continue
        met = value >= limit if at_least else value <= limit
        lines.append(table_row([aim, three_digits(value), "yes" if met else "**no**", "T1"]))
    return lines


class _Cases:
    """The figures of a result by kind and size."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self._cases = {
            (c["kind"], c["batch"], c["context"] // 1024, c["drafts"]): c
            for c in result["cases"]
            if c.get("kind") in _TITLES
        }

    def keys(self, kind: str) -> Iterable[tuple[int, int, int]]:
        """Rows, thousands of context and drafts of all cases of a kind."""
        return [key[1:] for key in self._cases if key[0] == kind]

    def time(self, kind: str, size: tuple[int, int, int], label: str = "ours") -> float | None:
        """Median of a side; None where it was not measured."""
        return self._cases.get((kind, *size), {}).get("times", {}).get(label, {}).get("p50")

    def arrays(self, size: tuple[int, int, int], label: str) -> float | None:
        """Median of what a side spends in NumPy."""
        case = self._cases.get(("host", *size), {})
        return case.get("arrays_us", {}).get(label, {}).get("p50")

    def stage_and_expand(self, size: tuple[int, int, int]) -> float | None:
        """Median of our host time without `append_blocks`."""
        return self._cases.get(("host", *size), {}).get("stage_and_expand_us", {}).get("p50")

    def ratio(self, kind: str, size: tuple[int, int, int], label: str) -> float | None:
        """How many times ours a side takes."""
        other, ours = self.time(kind, size, label), self.time(kind, size)
        return other / ours if other is not None and ours else None

    def growth(self) -> float | None:
        """Largest ratio of host times at 128k and at 8k of context."""
        found = [
            (self.time("host", (batch, 128, drafts)), self.time("host", (batch, 8, drafts)))
            for batch, context, drafts in self.keys("host")
            if context == 8
        ]
        return _most(long / short for long, short in found if long and short)

    def queued(self, what: str) -> float | None:
        """Most launches, or copies, of our steps."""
        cases = (c for key, c in self._cases.items() if key[0] == "host" and what in c)
        return _most(float(case[what]) for case in cases)


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _aims(cases: _Cases) -> Iterable[tuple[str, float | None, float, bool]]:
    """Text of an aim, what was measured, the limit, and whether more is better."""
    yield "launches a step, all sizes: 1", cases.queued("launches"), 1, False
    yield "copies a step, all sizes: 1", cases.queued("copies"), 1, False
    for batch, limit in ((256, 60), (32, 35), (1, 25)):
        yield (
            f"host time of `stage` and `expand` at {batch} x 8k, 3 drafts: at most {limit} us",
            cases.stage_and_expand((batch, 8, 3)),
            limit,
            False,
        )
    yield "host time at 128k against 8k: at most 1.3x", cases.growth(), 1.3, False
    small = [s for s in cases.keys("device") if s[0] <= 128 and s[1] <= 8 and s[2] <= 1]
    slowest = _most(cases.time("device", size) for size in small)
    yield "launch alone, up to 128 x 8k, 1 draft: at most 8 us", slowest, 8, False
    largest = cases.time("device", (256, 128, 3))
    yield "launch alone, 256 x 128k, 3 drafts: at most 12 us", largest, 12, False
    exposed = _least(cases.ratio("exposed", (128, 8, drafts), "loop") for drafts in _DRAFTS)
    yield "exposed time at 128 x 8k, the loop's against ours: at least 50x", exposed, 50, True
    for drafts, limit in zip(_DRAFTS, (10, 20, 40), strict=True):
        text = f"host time at 128 x 8k, {drafts} drafts, the loop's against ours: at least {limit}x"
        yield text, cases.ratio("host", (128, 8, drafts), "loop"), limit, True
    for context, drafts, limit in ((8, 0, 3), (128, 0, 20), (128, 3, 100)):
        text = (
            f"host time at 128 x {context}k, {drafts} drafts, the vectorised form's against ours: "
            f"at least {limit}x"
        )
        yield text, cases.ratio("host", (128, context, drafts), "vectorised"), limit, True
    every = list(cases.keys("device"))
    eager = (
        other / ours
        for size in every
        if (other := cases.time("device", size, "operators")) is not None
        and (ours := cases.time("device", size, "ours, eager"))
    )
    yield "device, eager, the operators' against ours: at least 5x", _least(eager), 5, True
    graph = _least(cases.ratio("device", size, "operators, graph") for size in every)
    yield "device, in graphs, the operators' against ours: at least 2x", graph, 2, True
    hidden = cases.result.get("overlap", {}).get("ours", {}).get("median")
    percent = None if hidden is None else 100 * hidden
    yield "share of a step's copy beside work, median: at least 90%", percent, 90, True
    check = cases.result.get("check_us", {}).get("p50")
    yield "checks of a step of 256 rows: at most 25 us", check, 25, False


def _sentences(result: Result) -> Iterable[str]:
    """What the cases without a table say."""
    counted = [case for case in result["cases"] if len(case.get("effects", ())) > 1]
    for case in counted:
        counts = ", ".join(
            f"{label} {n['launches']} and {n['copies']}" for label, n in case["effects"].items()
        )
        yield f"Launches and copies of a step at {case['case'].removesuffix(', host')}: {counts}."
    for case in result["cases"]:
        if case.get("kind") == "table":
            yield (
                f"In table mode, at {case['case'].removesuffix(', table')}, no list is written: "
                f"the launch takes {three_digits(case['times']['ours']['p50'])} us, the host "
                f"{three_digits(case['host_us']['p50'])} us, and all buffers together "
                f"{case['allocated_bytes'] / 2**20:.1f} MiB, where the list alone would have "
                f"{case['list_bytes'] / 2**20:.1f} MiB."
            )
    yield from overlap_sentences(result)


def _faster_than_ours(cases: _Cases) -> list[str]:
    """A list of the sizes at which a side takes less time than ours."""
    lines = ["Sizes at which another side takes less time than ours:", ""]
    for kind in ("host", "exposed"):
        every = list(cases.keys(kind))
        for label, name in _OTHERS.items():
            sizes = [size for size in every if (cases.ratio(kind, size, label) or 1) < 1]
            lines.append(f"- {kind} time, {name}: {_named(sizes, every)}")
    every = list(cases.keys("host"))
    for label in ("loop", "vectorised"):
        sizes = [
            size
            for size in every
            if (cases.arrays(size, label) or 1e9) < (cases.time("host", size) or 0)
        ]
        lines.append(
            f"- {_OTHERS[label]}, its arrays alone without a copy to the device, against our host "
            f"time: {_named(sizes, every)}"
        )
    return lines


def _named(sizes: Sequence[tuple[int, int, int]], every: Sequence[tuple[int, int, int]]) -> str:
    """Sizes in words."""
    if not sizes:
        return "none"
    if len(sizes) == len(every):
        return "all"
    by_size: dict[tuple[int, int], list[str]] = {}
    for batch, context, drafts in sorted(sizes):
        by_size.setdefault((batch, context), []).append(str(drafts))
    parts = [
        f"{batch} x {context}k ({', '.join(drafts)} drafts)"
        for (batch, context), drafts in by_size.items()
    ]
    return ", ".join(parts)


def overlap_sentences(result: Result) -> Iterable[str]:
    """How much of the copies was hidden, by side."""
    for label, found in result.get("overlap", {}).items():
        plural = "copies" if found["copies"] > 1 else "copy"
        where = f" at {result['overlap_case']}" if "overlap_case" in result else ""
        yield (
            f"{label[0].upper()}{label[1:]}{where}: of a step's {plural}, "
            f"{found['median']:.0%} lay beside work (median; {found['p5']:.0%} at the 5th "
            f"percentile), at least four fifths in {found['share_of_steps_above_80']:.0%} of steps."
        )
