"""What docs/performance.md says of benchmarks/results/sparse_mla.json beside its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks._harness import three_digits


def sparse_mla_sentences(result: Mapping[str, Any]) -> Iterator[str]:
    """Least ratios to the fastest peer of each kind of case, and the errors of all sides."""
    cases = [case for case in result["cases"] if case["ratio_best"]]
    for kind in dict.fromkeys(case["kind"] for case in cases):
        own = [case for case in cases if case["kind"] == kind]
        parts = []
        for gate in dict.fromkeys(case["gate"] for case in own):
            group = [case for case in own if case["gate"] == gate]
            worst = min(group, key=lambda case: case["ratio_best"])
            heads = ", ".join(str(n) for n in dict.fromkeys(case["heads"] for case in group))
            least = three_digits(worst["ratio_best"])
            parts.append(f"at {heads} heads at least {least} ({worst['case']}), wanted {gate}")
        yield f"How many times ours the time of the fastest peer is, {kind}: {'; '.join(parts)}."
    errors: dict[str, float] = {}
    for case in result["cases"]:
        for label, error in case["errors"].items():
            errors[label] = max(errors.get(label, 0.0), error)
    if errors:
        told = ", ".join(f"{label} {error:.1e}" for label, error in errors.items())
        yield f"Largest error against attention in doubles, relative: {told}."
    left = {
        f"{label} ({why})"
        for case in result["cases"]
        for label, why in case.get("left_out", {}).items()
    }
    if left:
        yield f"Left out: {', '.join(sorted(left))}."
