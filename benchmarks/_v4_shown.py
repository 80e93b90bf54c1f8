"""The tables of docs/results/v4_prepare.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks._harness import three_digits
from benchmarks._render import Case, Column, Result, Table, ceilings_line, labels_of, paragraphs

_DRAFTS = (0, 1, 3)
_TITLES = {
    "host": "Host time of a step, us, with 0 / 1 / 3 drafts",
    "exposed": "Exposed time of a step, us, with 0 / 1 / 3 drafts",
    "device": "Device time, us, with 0 / 1 / 3 drafts",
}


def v4_prepare(result: Result) -> Iterator[str]:
    """Yield a table for each kind over all sizes, faster sides, and further figures."""
    slower = []
    for kind, title in _TITLES.items():
        own = [case for case in result["cases"] if case["kind"] == kind]
        if own:
            yield from paragraphs(result, [f"{title}:", _size_table(own)])
            for label in labels_of(own):
                faster = sum(case["ratios"].get(label, 1) < 1 for case in own)
                if faster:
                    slower.append(f"- {kind} time, {label}: {faster} of {len(own)}")
    lines = "\n".join(slower or ["- none"])
    yield f"Sizes at which another side takes less time than ours:\n\n{lines}"
    for case in result["cases"]:
        if len(case.get("effects", ())) > 1:
            counts = (f"{k} {n['launches']} and {n['copies']}" for k, n in case["effects"].items())
            size = case["case"].removesuffix(f", {case['kind']}")
            yield f"Launches and copies of a step at {size}: {', '.join(counts)}."
    yield from ceilings_line(result)
    if "error" in result:
        yield f"The run was cut off: {result['error']}."


def _size_table(cases: Sequence[Case]) -> Table:
    """Return a table with sizes as rows and sides as columns.

    A cell has the figures of all numbers of drafts.
    """
    first = cases[0]
    columns: list[Column] = [("rows x context", lambda row: _size(row[0]))]

    def add(head: str, *path: str) -> None:
        def cell(row: Sequence[Case]) -> str:
            figures = {case["drafts"]: _figure(case, *path) for case in row}
            return " / ".join(figures.get(drafts, "-") for drafts in _DRAFTS)

        columns.append((head, cell))

    for label in labels_of(cases):
        add(f"**{label}**" if label == first["ours"] else label, "times", label, "p50")
        if label in first.get("arrays_us", ()):
            add(f"{label}, arrays alone", "arrays_us", label, "p50")
    if "stage_and_expand_us" in first:
        add("`stage` and `expand` alone", "stage_and_expand_us", "p50")
    if "p99" in first["times"][first["ours"]]:
        add("ours, p99", "times", first["ours"], "p99")
    if first["floor_us"]:
        add("of the floor, %", "percent_of_floor")
    columns.append(("tier", lambda row: row[0]["tier"]))
    rows: dict[tuple[int, int], list[Case]] = {}
    for case in sorted(cases, key=lambda c: (c["batch"], c["context"], c["drafts"])):
        rows.setdefault((case["batch"], case["context"]), []).append(case)
    return Table(lambda _: rows.values(), columns)


def _size(case: Case) -> str:
    return f"{case['batch']} x {case['context'] // 1024}k"


def _figure(case: Case, *path: str) -> str:
    """Return a figure of a case, "-" if it was not measured."""
    for key in path:
        if key not in case:
            return "-"
        case = case[key]
    return three_digits(case)  # type: ignore[arg-type]
