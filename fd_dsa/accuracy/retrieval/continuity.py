"""Does the model still answer when the context grows past index_topk? The same items, paired.

Up to index_topk tokens selection takes every key, and attention is dense. A selector that is broken
(or a wrong branch at that length) shows as items that pass below and fail above, while a model that
is merely weak fails on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fd_dsa.accuracy.retrieval.scoring import ItemScore
from fd_dsa.accuracy.stats import ALPHA, mcnemar, most_unseen_share


@dataclass(frozen=True)
class Step:
    """One length against the shortest, over the items that both have.

    Attributes:
        base: the shortest length, tokens.
        length: this one.
        passed: items that pass at this length.
        total: items at both.
        worse: items that pass at `base` and not here.
        better: items that pass here and not at `base`.
        p: exact two-sided McNemar.
    """

    base: int
    length: int
    passed: int
    total: int
    worse: int
    better: int
    p: float

    def to_json(self) -> dict[str, Any]:
        """The step as a JSON object."""
        return asdict(self)


def steps(scores: Sequence[ItemScore]) -> list[Step]:
    """Every length of a paired run against the shortest, itself included; empty without scores."""
    by_length: dict[int, dict[str, bool]] = {}
    for score in scores:
        by_length.setdefault(score.cell.length, {})[_item(score)] = score.passed
    if not by_length:
        return []
    base = min(by_length)
    return [_step(base, by_length[base], n, by_length[n]) for n in sorted(by_length)]


def _item(score: ItemScore) -> str:
    """What the prompts of all lengths share: task, depth, trial."""
    task, _, rest = score.key.split("/", 2)
    return f"{task}/{rest}"


def _step(base: int, before: dict[str, bool], length: int, after: dict[str, bool]) -> Step:
    """The flips between two lengths."""
    both = before.keys() & after.keys()
    worse = sum(before[item] and not after[item] for item in both)
    better = sum(after[item] and not before[item] for item in both)
    passed = sum(after[item] for item in both)
    return Step(base, length, passed, len(both), worse, better, mcnemar(worse, better))


def verdict(scores: Sequence[ItemScore], index_topk: int) -> str:
    """What the steps say, in words; lengths are tested together (Bonferroni)."""
    found = [step for step in steps(scores) if step.length > index_topk]
    every = steps(scores)
    if not found or every[0].base > index_topk:
        return "No lengths on both sides of index_topk: nothing can be said about it."
    before = [step for step in every if step.length <= index_topk]
    limit = ALPHA / max(1, len(every) - 1)
    down = [step for step in found if step.worse > step.better and step.p < limit]
    if not before[0].passed:
        return (
            f"No item passes even at {before[0].length} tokens, where attention is dense: this "
            "says nothing about selection."
        )
    if down:
        first = down[0]
        return (
            f"**A step**: from {first.length} tokens on (index_topk {index_topk}) items fail that "
            f"passed at {first.base}: {first.worse} worse, {first.better} better of {first.total} "
            f"(p = {first.p:.2g})."
        )
    shown = found[0]
    unseen = 100 * most_unseen_share(before[0].passed)
    return (
        f"No step at index_topk ({index_topk}): at {shown.length} tokens {shown.worse} of "
        f"{shown.total} items got worse and {shown.better} better. "
        + (
            f"A step that breaks fewer than {unseen:.1f} % of the items could be missed."
            if not shown.worse
            else "The difference is inside the noise of so many items."
        )
    )
