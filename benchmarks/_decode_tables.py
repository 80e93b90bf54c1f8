"""What docs/performance.md shows of benchmarks/results/decode_steps.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks._harness import table_row, three_digits


def decode_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown: a row for each case, what a step does beside launches, what is missing."""
    ways = list(dict.fromkeys(way for case in result["cases"] for way in case["times"]))
    head = ["rows x context", *(f"{way}, us" for way in ways)]
    head += [f"{way}, in the runner, us" for way in ways]
    yield from ("", table_row([*head, "tier"]), "|---" * (len(head) + 1) + "|")
    for case in result["cases"]:
        cells = [case["case"], *(_time(case, way) for way in ways)]
        cells += [_runner(case, way) for way in ways]
        yield table_row([*cells, case["tier"]])
    for way in ways:
        counted = [case["counted"][way] for case in result["cases"] if way in case["counted"]]
        names = sorted({name for found in counted for name in found if "bytes" not in name})
        told = ", ".join(f"{max(found.get(n, 0) for found in counted)} {n}" for n in names)
        yield f"\nA step, {way}, at most: {told.replace('_', ' ') or 'nothing beside launches'}."
    for way, why in result.get("failed", {}).items():
        yield f"\nFailed: {way} ({why})."


def _time(case: Mapping[str, Any], way: str) -> str:
    """A median; of the other way also how many times ours it is."""
    if way not in case["times"]:
        return ""
    time = three_digits(case["times"][way]["p50"])
    return f"**{time}**" if way == case["ours"] else f"{time} ({case['ratios'][way]:.2f}x)"


def _runner(case: Mapping[str, Any], way: str) -> str:
    """The part of a step that the runner has."""
    return three_digits(case["runner"][way]["p50"]) if way in case["runner"] else ""
