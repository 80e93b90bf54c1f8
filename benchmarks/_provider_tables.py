"""What docs/performance.md shows of benchmarks/results/providers.json: two small tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks._harness import table_row, three_digits

_OURS = "our kernel"
# two kinds of tokens, scored one after the other, are both of a step
_SERVED = ("FlashMLA", "DeepGEMM", "DeepGEMM, pages", "DeepGEMM, gathered")

Columns = dict[tuple[str, int], str]


def provider_tables(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown: attention and the indexer at the steps of all models, and deviations."""
    kernels = {c["heads"]: c["kernel_heads"] for c in _cases(result, "attention")}
    attention: Columns = {
        ("attention", heads): f"{heads} heads" + ("" if heads == own else f", padded to {own}")
        for heads, own in kernels.items()
    }
    index_heads = dict.fromkeys(c["heads"] for c in _cases(result, "scores"))
    indexer: Columns = {
        (what, heads): f"{what}, {heads} index heads"
        for heads in index_heads
        for what in ("scores", "selection")
    }
    steps = [c["step"] for c in _cases(result, "attention")]
    shown = [step for step in dict.fromkeys(steps) if steps.count(step) == len(kernels)]
    yield from _table(result, "ours / FlashMLA, us", attention, shown)
    yield from _table(result, "ours / DeepGEMM, us", indexer, shown)
    yield from _deviations(result)


def _cases(result: Mapping[str, Any], what: str) -> list[Mapping[str, Any]]:
    """The cases of attention, scores or selection."""
    return [case for case in result["cases"] if case["what"] == what]


def _table(
    result: Mapping[str, Any], corner: str, columns: Columns, steps: list[str]
) -> Iterator[str]:
    """One table, a row a step."""
    own = {(c["what"], c.get("heads"), c["step"]): c for c in result["cases"]}
    head = [corner, *columns.values(), "tier"]
    yield from ("", table_row(head), "|---" * len(head) + "|")
    for step in steps:
        cases = [own.get((*column, step)) for column in columns]
        tiers = dict.fromkeys(case["tier"] for case in cases if case)
        yield table_row([step, *(_cell(case) for case in cases), ", ".join(tiers)])


def _cell(case: Mapping[str, Any] | None) -> str:
    """Our time, that of the package, and how many times it ours is."""
    if case is None:
        return ""
    times = {label: time["p50"] for label, time in case["times"].items()}
    ours, theirs = times[_OURS], sum(times.get(label, 0.0) for label in _SERVED)
    return f"{three_digits(ours)} / {three_digits(theirs)} ({three_digits(ours / theirs)}x)"


def _deviations(result: Mapping[str, Any]) -> Iterator[str]:
    """How far the packages were from our kernels."""
    checks = [
        check
        for name, of_model in result.items()
        if name.startswith("checks_")
        for check in of_model.values()
    ]
    if not checks:
        return
    attention = max(check["attention"] for check in checks)
    scores = max(check.get(kind, 0.0) for check in checks for kind in ("pages", "gathered"))
    least = min(check["recall"] for check in checks)
    yield ""
    yield (
        f"Largest deviation from our kernels, relative: attention {attention:.1e}, scores "
        f"{scores:.1e}. Of the keys that our scores choose, at least {least:.2%} are chosen by "
        "theirs."
    )
