"""What docs/performance.md says of benchmarks/results/layer_stack.json beside its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks._harness import three_digits
from benchmarks._stack_shapes import ALL, EAGER, GRAPH, PEERS

Case = Mapping[str, Any]


def layer_stack_sentences(result: Mapping[str, Any]) -> Iterator[str]:
    """Least ratios where some are wanted, those to the peers, counts, errors, what is missing."""
    cases = result["cases"]
    yield from _wanted(cases)
    for kind in (GRAPH, EAGER):
        own = [case for case in cases if case["kind"] == kind]
        for label, said in ((ALL, "of all that FastDeploy's layers launch"), (PEERS, "of peers")):
            if any(label in case["ratios"] for case in own):
                yield f"How many times ours the time {said} is, {kind}: {_spread(own, label)}."
    counted = [case for case in cases if "package_alone" in case]
    if counted:
        yield _counts(counted)
    made_by = {f"{what} by {who}" for case in cases for what, who in case["made_by"].items()}
    if made_by:
        yield f"The fastest of the peers, in one case or another: {', '.join(sorted(made_by))}."
    errors: dict[str, float] = {}
    for case in cases:
        for label, found in case["errors"].items():
            errors[label] = max(errors.get(label, 0.0), found["attention"])
    if errors:
        told = ", ".join(f"{label} {error:.1e}" for label, error in errors.items())
        yield f"Largest error of a layer's attention against doubles, relative: {told}."
    left = {f"{label} ({why})" for case in cases for label, why in case["left_out"].items()}
    if left:
        yield f"Left out: {', '.join(sorted(left))}."
    others = [name for name, serves in result.get("custom_ops", {}).items() if serves is not True]
    if others:
        yield f"Of custom_ops/ did not serve: {', '.join(others)}."


def _wanted(cases: list[Case]) -> Iterator[str]:
    """The least ratio of A and of B for each ratio that is wanted."""
    groups: dict[tuple[str, str, float], list[tuple[float, str]]] = {}
    for case in cases:
        for label, least in case["wanted"].items():
            # elsewhere both baselines, in graphs and eager, are one group
            key = ("A and B elsewhere", "", least) if least == 1 else (label, case["kind"], least)
            groups.setdefault(key, []).append((case["ratios"][label], f"{label}, {case['case']}"))
    for (label, kind, least), found in groups.items():
        ratio, where = min(found)
        name = f"{label}, {kind}" if kind else label
        verdict = "reached" if ratio >= least else "missed"
        yield f"{name}: at least {_ratio(ratio)} ({where}), wanted {_ratio(least)}: {verdict}."


def _ratio(value: float) -> str:
    """A ratio whose hundredths matter."""
    return f"{value:.3f}x"


def _spread(cases: list[Case], label: str) -> str:
    """Least and largest ratio to a side."""
    found = sorted((c["ratios"][label], c["case"]) for c in cases if label in c["ratios"])
    least, most = found[0], found[-1]
    return f"{three_digits(least[0])} ({least[1]}) to {three_digits(most[0])} ({most[1]})"


def _counts(cases: list[Case]) -> str:
    """What a step of the package alone does at most."""
    most = {
        name: max(case["package_alone"][key] for case in cases)
        for key, name in (
            ("launches", "launches"),
            ("copies", "copies"),
            ("host_waits", "waits of the host"),
            ("allocations", "allocations"),
        )
    }
    told = ", ".join(f"{count} {name}" for name, count in most.items())
    return (
        f"A step without the products of torch, which allocate their results, is at most {told}; "
        "the columns above count whole eager steps."
    )
