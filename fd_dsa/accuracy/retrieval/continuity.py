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


def verdict(scores: Sequence[ItemScore], index_topk: int, max_tokens: int) -> str:
    """What the steps say, in words; lengths are tested together (Bonferroni).

    Args:
        max_tokens: of an answer; a prompt that is dense may have an answer whose end is not.
    """
    every = steps(scores)
    beyond = [step for step in every if step.length > index_topk]
    if not beyond or every[0].base > index_topk:
        return "No lengths on both sides of index_topk: nothing can be said about it."
    base, passed = every[0].base, every[0].passed
    if not passed:
        return (
            f"No item passes even at {base} tokens, where attention is dense: this says nothing "
            "about selection."
        )
    limit = ALPHA / (len(every) - 1)
    fallen = [step for step in every if step.worse > step.better and step.p < limit]
    if fallen:
        return _fall(fallen[0], index_topk, max_tokens)
    shown = beyond[0]
    if shown.worse:
        unseen = "The difference is inside the noise of so many items."
    else:
        share = 100 * most_unseen_share(passed)
        unseen = f"What breaks fewer than {share:.1f} % of the items could be missed."
    return (
        f"No step at index_topk ({index_topk}): against {base} tokens, at {shown.length} "
        f"{shown.worse} of {shown.total} items got worse and {shown.better} better. {unseen}"
    )


def _fall(step: Step, index_topk: int, max_tokens: int) -> str:
    """The first length at which the model is worse than at the shortest, and what may be broken."""
    if step.length + max_tokens <= index_topk:
        where = "attention is dense there to the end of the answer, so it is not selection"
    elif step.length <= index_topk:
        where = "the prompt is dense there and the end of the answer is not: look at decoding"
    else:
        where = "there the prompt is sparse and below it was dense: look at selection"
    return (
        f"**A step** at {step.length} tokens (index_topk {index_topk}): {step.worse} of "
        f"{step.total} items that passed at {step.base} fail, {step.better} the other way round "
        f"(p = {step.p:.2g}); {where}."
    )
