"""Is an answer right: which of the hidden strings does it name? And does that change with length?

`passed` = it names every string that was asked for and no other that the text hides. `share` = of
the asked strings those that it names: RULER's score (arXiv 2404.06654), which forgives others.

Up to index_topk tokens selection takes every key, and attention is dense. With a broken selector
(or a wrong branch at that length) the same items pass below and fail above, while a model that is
merely weak fails on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fd_dsa.accuracy.answers import Record
from fd_dsa.accuracy.retrieval.plan import Cell
from fd_dsa.accuracy.stats import ALPHA, mcnemar, most_unseen_share
from fd_dsa.accuracy.types import prompt_score, without_reasoning
from fd_dsa.client.questions import Answer

# 1,234,567 is read as 1234567
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass(frozen=True)
class ItemScore:
    """One answer: which of the wanted strings it names, and which others of the hidden ones."""

    key: str
    cell: Cell
    wanted: tuple[str, ...]
    found: tuple[bool, ...]
    wrong: tuple[str, ...]
    answer: Answer

    @property
    def passed(self) -> bool:
        """True if the answer names all that was asked for and nothing else that is hidden."""
        return all(self.found) and not self.wrong

    @property
    def share(self) -> float:
        """Share of the asked strings that the answer names."""
        return sum(self.found) / len(self.found)

    def to_json(self) -> dict[str, Any]:
        """The score as a JSON object: that of a `PromptScore`, and what the task adds.

        An instruction is a string that was asked for; it is followed loosely if the answer names
        it, and strictly if the answer names nothing wrong as well.
        """
        strict = tuple(found and not self.wrong for found in self.found)
        names = (self.cell.task,) * len(self.found)
        score = prompt_score(self.answer, names, strict, self.found)
        more = {"wanted": self.wanted, "wrong": self.wrong, "answer": self.answer.text}
        return {**asdict(score), **asdict(self.cell), **more}


def named(text: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """Candidates that are in the text as whole words; commas of thousands do not matter."""
    plain = _THOUSANDS.sub("", text)
    return tuple(c for c in candidates if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", plain))


def score_record(record: Record) -> ItemScore:
    """The score of a kept answer."""
    metadata, text = record.metadata, without_reasoning(record.answer.text)
    references = tuple(metadata["references"])
    right = named(text, references)
    return ItemScore(
        record.answer.key,
        Cell(metadata["task"], metadata["length"], metadata["depth"]),
        references,
        tuple(reference in right for reference in references),
        named(text, metadata["others"]),
        record.answer,
    )


@dataclass(frozen=True)
class Step:
    """One length against the shortest, over the items that both have: which ones flipped."""

    base: int
    length: int
    passed: int
    total: int
    worse: int
    better: int
    p: float


def steps(scores: Sequence[ItemScore]) -> list[Step]:
    """Every length of a paired run against the shortest, itself included."""
    by_length: dict[int, dict[str, bool]] = {}
    for score in scores:
        # what the prompts of all lengths share: task, depth, trial
        task, _, rest = score.key.split("/", 2)
        by_length.setdefault(score.cell.length, {})[f"{task}/{rest}"] = score.passed
    base, found = min(by_length), []
    for length, after in sorted(by_length.items()):
        before = by_length[base]
        both = before.keys() & after.keys()
        worse = sum(before[item] and not after[item] for item in both)
        better = sum(after[item] and not before[item] for item in both)
        passed, p = sum(after[item] for item in both), mcnemar(worse, better)
        found.append(Step(base, length, passed, len(both), worse, better, p))
    return found


def verdict(scores: Sequence[ItemScore], index_topk: int, max_tokens: int) -> str:
    """What the steps say, in words; lengths are tested together (Bonferroni).

    Args:
        max_tokens: of an answer; a prompt that is dense may have an answer whose end is not.
    """
    every = steps(scores)
    beyond = [step for step in every if step.length > index_topk]
    if not beyond or every[0].base > index_topk:
        return "No lengths on both sides of index_topk: the results say nothing about it."
    base, passed = every[0].base, every[0].passed
    if not passed:
        return (
            f"No item passes even at {base} tokens, where attention is dense: this says nothing "
            "about selection."
        )
    limit = ALPHA / (len(every) - 1)
    for step in every:
        if step.worse > step.better and step.p < limit:
            return _fall(step, index_topk, max_tokens)
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
