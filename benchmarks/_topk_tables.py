"""What docs/performance.md says of benchmarks/results/topk.json beside its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks._harness import three_digits

Case = Mapping[str, Any]
_THOUSAND = 1024
# note of a case -> what it compares our kernel with
_AGAINST = {
    "ratio_same_rule": "the peer with our rule for equal scores",
    "ratio_best_exact": "the fastest exact peer of each case",
}


def topk_sentences(result: Mapping[str, Any]) -> Iterator[str]:
    """Least ratios over all cases and over the large ones, and what inexact peers miss."""
    cases = result["cases"]
    for note, peer in _AGAINST.items():
        peer = f"{peer} ({result['same_rule']})" if note == "ratio_same_rule" else peer
        parts = [
            f"{where} at least {_least(own, note)}"
            for where, chosen in _WHERE.items()
            if (own := [case for case in cases if note in case and chosen(case)])
        ]
        if parts:
            yield f"How many times ours the time of {peer} is: {', '.join(parts)}."
    missed: dict[str, tuple[float, str]] = {}
    for case in cases:
        for label, right in case.get("share_right", {}).items():
            missed[label] = max(missed.get(label, (0.0, "")), (1 - right, case["case"]))
    if missed:
        told = ", ".join(
            f"{label} up to {share:.1%} ({case})" for label, (share, case) in sorted(missed.items())
        )
        yield f"Scores chosen that are not among the best: {told}."


_WHERE: dict[str, Callable[[Case], bool]] = {
    "everywhere": lambda case: True,
    "at 32 rows and more of 32k and more": lambda case: (
        case["rows"] >= 32 and case["width"] >= 32 * _THOUSAND
    ),
    "at one row of 16k and more": lambda case: (
        case["rows"] == 1 and case["width"] >= 16 * _THOUSAND
    ),
}


def _least(cases: Sequence[Case], note: str) -> str:
    """The least ratio and where it is."""
    worst = min(cases, key=lambda case: case[note])
    return f"{three_digits(worst[note])} ({worst['case']})"
