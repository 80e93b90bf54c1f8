"""Scores of answers, their change with length, and tables of both.

An answer passes if it names every requested string and no other hidden one.

Up to index_topk tokens selection takes every key, so attention is dense. With a broken selector (or
a wrong branch at that length) the same items pass below and fail above. A weak model fails on both
sides.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fd_dsa.accuracy.compare import MetricChange, metric_change
from fd_dsa.accuracy.retrieval.plan import Plan
from fd_dsa.accuracy.scores import (
    PROMPT_STRICT,
    PromptScore,
    Scores,
    cut_warning,
    prompt_score,
    without_reasoning,
    write_report,
)
from fd_dsa.accuracy.stats import ALPHA, max_unseen_share, wilson
from fd_dsa.client.questions import Answer
from fd_dsa.command_line.report import Table

# reads 1,234,567 as 1234567
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def named(text: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """Return the candidates in the text as whole words, ignoring commas of thousands."""
    plain = _THOUSANDS.sub("", text)
    return tuple(c for c in candidates if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", plain))


def score_answer(answer: Answer) -> PromptScore:
    """Return the score of an answer, in which each requested string counts as an instruction.

    It is followed loosely if the answer names it, and strictly if the answer also names no other
    hidden string.
    """
    text = without_reasoning(answer.text)
    wanted, others = answer.metadata["references"], answer.metadata["others"]
    right, wrong = named(text, wanted), named(text, others)
    loose = tuple(string in right for string in wanted)
    strict = tuple(found and not wrong for found in loose)
    task = answer.key.partition("/")[0]
    return prompt_score(answer, (task,) * len(wanted), strict, loose)


def changes_by_length(scores: Sequence[PromptScore]) -> dict[int, MetricChange]:
    """Compare the items of a paired run at every length with the same at the shortest."""
    by_length: dict[int, list[PromptScore]] = defaultdict(list)
    for score in scores:
        by_length[int(score.key.split("/")[1])].append(score)
    shortest = by_length[min(by_length)]
    return {
        length: metric_change(PROMPT_STRICT, shortest, own)
        for length, own in sorted(by_length.items())
    }


def verdict(changes: Mapping[int, MetricChange], index_topk: int, max_tokens: int) -> str:
    """Describe the changes in words.

    Lengths are tested together (Bonferroni).

    Args:
        max_tokens: maximum length of an answer. A dense prompt may have an answer with a sparse
            end.
    """
    base = min(changes)
    passed, total = changes[base].before.passed, changes[base].before.total
    beyond = [length for length in changes if length > index_topk]
    if not beyond or base > index_topk:
        return "No lengths on both sides of index_topk: the results do not cover it."
    if not passed:
        return (
            f"No item passes even at {base} tokens, where attention is dense: this does not "
            "test selection."
        )
    limit = ALPHA / (len(changes) - 1)
    for length, change in changes.items():
        assert change.p is not None
        if change.worse > change.better and change.p < limit:
            return (
                f"**A step** at {length} tokens (index_topk {index_topk}): {change.worse} of "
                f"{total} items that passed at {base} fail, {change.better} the other way round "
                f"(p = {change.p:.2g}); {_cause(length, index_topk, max_tokens)}."
            )
    first = changes[beyond[0]]
    unseen = "The difference is inside the noise of so many items."
    if not first.worse:
        share = 100 * max_unseen_share(passed)
        unseen = f"What breaks fewer than {share:.1f} % of the items could be missed."
    return (
        f"No step at index_topk ({index_topk}): against {base} tokens, at {beyond[0]} "
        f"{first.worse} of {total} items got worse and {first.better} better. {unseen}"
    )


def _cause(length: int, index_topk: int, max_tokens: int) -> str:
    """Describe the possible cause of a loss that begins at a length."""
    if length + max_tokens <= index_topk:
        return "attention is dense there to the end of the answer, so it is not selection"
    if length <= index_topk:
        return "the prompt is dense there and the end of the answer is not: look at decoding"
    return "there the prompt is sparse and below it was dense: look at selection"


@dataclass(frozen=True)
class Results:
    """The scored answers of a run.

    Attributes:
        index_topk: None if unknown.
    """

    scores: Scores
    plan: Plan
    index_topk: int | None

    @cached_property
    def cells(self) -> dict[tuple[str, int, float], list[bool]]:
        """(task, length, depth) -> whether each of its prompts passed."""
        cells = defaultdict(list)
        for score in self.scores.prompts:
            task, length, depth, _ = score.key.split("/")
            cells[task, int(length), float(depth)].append(score.passed)
        return cells

    def publish(self, out: Path) -> None:
        """Print the report, and write it with the scores."""
        changes = changes_by_length(self.scores.prompts) if self.plan.paired else {}
        parts: list[str | Table] = [self._about(), *map(self._table, self.plan.tasks)]
        parts += [self._length_check(), *cut_warning(self.scores)]
        if changes and self.index_topk is not None:
            parts.append(self._continuity(changes))
            parts.append(verdict(changes, self.index_topk, self.plan.max_tokens))
        cells = [
            {"task": task, "length": length, "depth": depth, "passed": sum(p), "total": len(p)}
            for (task, length, depth), p in self.cells.items()
        ]
        continuity = {length: change.to_json() for length, change in changes.items()}
        write_report(out, "Retrieval", self.scores, parts, cells=cells, continuity=continuity)

    def _label(self, length: int) -> str:
        """Return a length as text, marked if attention is dense."""
        dense = self.index_topk is not None and length <= self.index_topk
        return f"{length} (dense)" if dense else str(length)

    def _about(self) -> str:
        topk = self.index_topk
        selects = "" if topk is None else f" index_topk is {topk}: longer prompts are sparse."
        return (
            f"Model `{self.scores.settings.model}`, {len(self.scores.prompts)} answers; seed "
            f"{self.plan.seed}, {self.plan.trials} prompts of each task, length and depth. Passed: "
            "the answer names all requested values and no other value of the text. Intervals: "
            f"Wilson, 95 %.{selects}"
        )

    def _table(self, task: str) -> Table:
        """Return a table of the passed and tried items of a task, by length and depth."""
        rows = []
        for length in self.plan.lengths:
            cells = [self.cells[task, length, depth] for depth in self.plan.depths]
            passed, total = sum(map(sum, cells)), sum(map(len, cells))
            counts = [f"{sum(cell)}/{len(cell)}" for cell in cells]
            rows.append((self._label(length), *counts, wilson(passed, total).percent()))
        depths = (f"at {100 * depth:g} %" for depth in self.plan.depths)
        columns = ("tokens", *depths, "passed, % [95 % interval]")
        return Table(f"{task}: passed / tried by tokens and depth", columns, tuple(rows))

    def _length_check(self) -> str:
        """Compare the server's counts of prompt tokens with the plan's lengths."""
        lengths = [int(score.key.split("/")[1]) for score in self.scores.prompts]
        counts = [score.prompt_tokens for score in self.scores.prompts]
        pairs = zip(counts, lengths, strict=True)
        differences = [theirs - ours for theirs, ours in pairs if theirs is not None]
        if not differences:
            return "The server reports no prompt tokens, so lengths are by the local tokenizer."
        low, high = min(differences), max(differences)
        if low == high == 0:
            return f"The server counts the same lengths ({len(differences)} prompts)."
        return (
            f"Warning: the server counts {low:+d} to {high:+d} tokens against ours. If both are "
            "equal, its chat template is another one: add that to the lengths. Otherwise this "
            "tokenizer is not the served model's: give its folder with --tokenizer."
        )

    def _continuity(self, changes: Mapping[int, MetricChange]) -> Table:
        rows = [
            (
                self._label(length),
                change.after.share.percent(),
                str(change.worse),
                str(change.better),
                f"{change.p:.3g}",
            )
            for length, change in changes.items()
        ]
        columns = ("tokens", "passed %", "worse", "better", "McNemar p")
        title = f"Across index_topk: the same items at every length, against {min(changes)} tokens"
        return Table(title, columns, tuple(rows))
