"""What a comparison shows and what it cannot, in words."""

from __future__ import annotations

from fd_dsa.accuracy.paired import Comparison, MetricChange
from fd_dsa.accuracy.report import signed
from fd_dsa.accuracy.stats import (
    ALPHA,
    Estimate,
    least_one_sided_flips,
    most_unseen_share,
    smallest_difference,
)

FLIP_RATES = (0.02, 0.05, 0.10)
"""Shares of flipping prompts for which the smallest visible difference is told."""


def verdict(found: Comparison) -> list[str]:
    """Sentences, the conclusion first."""
    if found.same_answers == found.prompts:
        return [_equal(found), *_scorer(found)]
    return [
        *_tested(found, found.primary),
        _answers(found),
        visible(found.prompts, flip_rate(found)),
        *_scorer(found),
    ]


def flip_rate(found: Comparison) -> float:
    """Share of prompts whose strict result changed."""
    return (found.primary.worse + found.primary.better) / found.prompts


def visible(prompts: int, observed: float) -> str:
    """The sentence on the smallest difference that so many prompts can show.

    Args:
        prompts: in both runs.
        observed: share of them that flipped; 0 where none did.
    """
    sizes = [f"{_least(prompts, rate)} if {100 * rate:.0f} % flip" for rate in FLIP_RATES]
    if observed > 0:
        sizes.append(f"{_least(prompts, observed)} at the observed {100 * observed:.1f} %")
    least = least_one_sided_flips()
    return (
        f"The smallest difference that {counted(prompts, 'prompt')} can show with 80 % power: "
        f"{', '.join(sizes)}. Fewer than {least} net flips ({100 * least / prompts:.1f} points) "
        "are never significant."
    )


def counted(number: int, thing: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def p_value(p: float) -> str:
    """`p = 0.031`; very small ones as a bound."""
    digits = p_digits(p)
    return f"p {digits}" if digits.startswith("<") else f"p = {digits}"


def p_digits(p: float) -> str:
    """`0.031`, two digits; very small ones as a bound."""
    return "< 0.0001" if p < 0.0001 else f"{p:#.2g}"


def _least(prompts: int, rate: float) -> str:
    """The smallest visible difference in points."""
    least = smallest_difference(prompts, rate)
    return "none" if least is None else f"{100 * least:.1f} points"


def _equal(found: Comparison) -> str:
    """The runs gave the same text everywhere."""
    return (
        f"Equal, answer by answer: all {counted(found.prompts, 'answer')} have the same SHA-256 in "
        "both runs. That is the strongest statement there is: on these prompts nothing changed, "
        "and no statistics are needed."
    )


def _answers(found: Comparison) -> str:
    """How many answers differ."""
    known = found.prompts - found.unknown_answers
    text = f"{known - found.same_answers} of {counted(known, 'answer')} differ in their text"
    if found.unknown_answers:
        text += f"; {counted(found.unknown_answers, 'answer')} cannot be compared, hash missing"
    return text + "."


def _tested(found: Comparison, change: MetricChange) -> list[str]:
    """What flips, exact test and interval say about the primary metric."""
    if change.paired is None or change.p is None:
        raise ValueError("the primary metric is on the prompt level")
    if change.worse + change.better == 0:
        most = 100 * most_unseen_share(found.prompts)
        return [
            "No change: no prompt changed its strict result. At most "
            f"{most:.2g} % of such prompts change theirs (95 % confidence)."
        ]
    value, low, high = map(signed, change.paired)
    flips = (
        f"of {counted(found.prompts, 'prompt')}, {change.worse} got worse and {change.better} got "
        f"better ({p_value(change.p)}, exact McNemar); the difference is {value} points, 95 % "
        f"interval {low} to {high}"
    )
    if change.p > ALPHA:
        return [f"No difference shown: {flips}.", _not_excluded(change.paired)]
    return [f"After is {'worse' if change.worse > change.better else 'better'}: {flips}."]


def _not_excluded(difference: Estimate) -> str:
    """What the interval leaves possible where the test shows nothing."""
    if not difference.low <= 0 <= difference.high:
        return (
            "Borderline: the interval leaves zero out, the exact test, which decides, does not; "
            "only a run on other prompts could tell."
        )
    loss, gain = (f"{100 * part:.1f}" for part in (-difference.low, difference.high))
    return (
        f"That is no proof of equality: a loss of up to {loss} points and a gain of up to {gain} "
        "points fit these runs."
    )


def _scorer(found: Comparison) -> list[str]:
    """A warning where equal answers were scored differently."""
    flips = {flip.key: flip for flip in (*found.strict, *found.loose)}
    keys = [key for key, flip in flips.items() if flip.same_answer]
    if not keys:
        return []
    return [
        f"Warning: {counted(len(keys), 'prompt')} got another result for the same answer (key "
        f"{', '.join(keys)}): the scoring differs there, not the model; score both runs again."
    ]
