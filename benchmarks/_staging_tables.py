"""What docs/performance.md shows of benchmarks/results/staging.json: a table and what was raced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks._harness import table_row, three_digits

_HEAD = (
    "way to the device",
    "copies a step, KiB",
    "copy, us",
    "work, us",
    "beside work (5th percentile)",
    "steps with four fifths beside",
    "copies that wait for the work",
    "`stage`, us (p99)",
    "`expand`, us (p99)",
    "host waits",
    "steps read wrong",
    "tier",
)


def staging_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown: a row for each way to the device, and runs without guards."""
    cases = result["cases"]
    yield from ("", table_row(_HEAD), "|---" * len(_HEAD) + "|")
    for case in cases:
        yield table_row(_cells(case))
    for case in cases:
        if case.get("unguarded"):
            found = "; ".join(f"{name}: {wrong}" for name, wrong in case["unguarded"].items())
            yield ""
            yield (
                f"{case['case']} without guards, steps read wrong of {case['unguarded_steps']}: "
                f"{found}."
            )


def _cells(case: Mapping[str, Any]) -> list[str]:
    """One row."""
    staged, host = case["overlap"], case["host_us"]
    return [
        case["case"],
        f"{case['copies_a_step']:.0f}, {case['bytes_a_step'] / 1024:.1f}",
        three_digits(staged["copy_us"]),
        three_digits(staged["work_us"]),
        f"{staged['median']:.0%} ({staged['p5']:.0%})",
        f"{staged['share_of_steps_above_80']:.0%}",
        f"{case['control']['median']:.0%}",
        *(
            f"{three_digits(host[f'{name}_p50'])} ({three_digits(host[f'{name}_p99'])})"
            for name in ("stage", "expand")
        ),
        str(case["host_waits"]),
        f"{case['wrong_steps']:,} of {case['raced_steps']:,}",
        case["tier"],
    ]
