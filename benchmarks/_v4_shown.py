"""The table of docs/results/v4_prepare.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks._harness import three_digits
from benchmarks._render import Case, Column, Result, Table, ceilings_line, gpu_machine, labels_of

_DRAFTS = (0, 1, 3)
_KINDS = "host", "exposed", "device"
_SHOWN = "vectorised", "operators, graph"
"""Sides with columns of their own, as ratios to ours."""


def v4_prepare(result: Result) -> Iterator[str]:
    """Return the machine, times and ratios of all sizes, and further figures."""
    lead = "Times of ours in us and the other sides divided by ours, with 0 / 1 / 3 drafts:"
    yield " ".join([*gpu_machine(result), *ceilings_line(result), lead])
    columns: list[Column] = [("rows x context", lambda row: _size(row[0]))]
    slower = []
    for kind in _KINDS:
        own = [case for case in result["cases"] if case["kind"] == kind]
        columns += _columns(kind, own)
        for label in labels_of(own):
            faster = sum(case["ratios"].get(label, 1) < 1 for case in own)
            if faster:
                slower.append(f"{label} in {faster} of {len(own)} cases ({kind} time)")
    rows: dict[tuple[int, int], list[Case]] = {}
    for case in sorted(result["cases"], key=lambda c: (c["batch"], c["context"])):
        rows.setdefault((case["batch"], case["context"]), []).append(case)
    yield "\n".join(Table(lambda _: rows.values(), columns).lines(result))
    yield f"Sides with less time than ours: {', '.join(slower) or 'no other'}."
    for case in result["cases"]:
        if len(case.get("effects", ())) > 1:
            counts = (f"{k} {n['launches']} and {n['copies']}" for k, n in case["effects"].items())
            size = case["case"].removesuffix(f", {case['kind']}")
            yield f"Launches and copies of a step at {size}: {', '.join(counts)}."
    if "error" in result:
        yield f"The run was cut off: {result['error']}."


def _columns(kind: str, own: Sequence[Case]) -> Iterator[Column]:
    """Yield the columns of a kind of time: ours, its p99 if measured, and the other sides."""
    if not own:
        return
    ours = own[0]["ours"]
    yield f"{kind}: **ours**", _cell(kind, "times", ours, "p50")
    if "p99" in own[0]["times"][ours]:
        yield "p99", _cell(kind, "times", ours, "p99")
    for label in _SHOWN:
        if label in own[0]["times"]:
            yield label, _cell(kind, "ratios", label)


def _cell(kind: str, *path: str) -> Callable[[Sequence[Case]], str]:
    """Return a cell with the figures of all numbers of drafts."""

    def cell(row: Sequence[Case]) -> str:
        figures = {case["drafts"]: _figure(case, *path) for case in row if case["kind"] == kind}
        return " / ".join(figures.get(drafts, "-") for drafts in _DRAFTS)

    return cell


def _size(case: Case) -> str:
    return f"{case['batch']} x {case['context'] // 1024}k"


def _figure(case: Case, *path: str) -> str:
    """Return a figure of a case, or "-" if it was not measured."""
    for key in path:
        if key not in case:
            return "-"
        case = case[key]
    return three_digits(case)  # type: ignore[arg-type]
