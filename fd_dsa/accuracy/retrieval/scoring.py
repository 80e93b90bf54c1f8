"""Scores of answers, their change with length, and tables of both.

`passed`: the answer names every requested string and no other hidden one. `share`: the share of
requested strings that it names. That is RULER's score (arXiv 2404.06654), which ignores other
strings.

Up to index_topk tokens selection takes every key, so attention is dense. With a broken selector (or
a wrong branch at that length) the same items pass below and fail above. A weak model fails on both
sides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fd_dsa.accuracy.retrieval.plan import Cell, Plan
from fd_dsa.accuracy.retrieval.prompts import CHAINS, HOPS, KEYS
from fd_dsa.accuracy.scores import (
    REPORT_FILE,
    SCORES_FILE,
    RunSettings,
    prompt_score,
    settings_table,
    shown,
    without_reasoning,
)
from fd_dsa.accuracy.stats import ALPHA, max_unseen_share, mcnemar, wilson
from fd_dsa.client.questions import Answer
from fd_dsa.command_line.report import Table, as_json, page

_SHOWN_FAILURES = 5
# reads 1,234,567 as 1234567
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass(frozen=True)
class ItemScore:
    """The score of one answer: the wanted strings it names, and the wrong ones."""

    key: str
    cell: Cell
    wanted: tuple[str, ...]
    found: tuple[bool, ...]
    wrong: tuple[str, ...]
    answer: Answer

    @property
    def passed(self) -> bool:
        return all(self.found) and not self.wrong

    @property
    def share(self) -> float:
        return sum(self.found) / len(self.found)

    def to_json(self) -> dict[str, Any]:
        """Return the score as a JSON object: the fields of a `PromptScore` and of the task.

        Each requested string counts as an instruction. It is followed loosely if the answer names
        it, and strictly if the answer also names no wrong string.
        """
        strict = tuple(found and not self.wrong for found in self.found)
        names = (self.cell.task,) * len(self.found)
        score = prompt_score(self.answer, names, strict, self.found)
        more = {"wanted": self.wanted, "wrong": self.wrong, "answer": self.answer.text}
        return {**asdict(score), **asdict(self.cell), **more}


def named(text: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """Return the candidates in the text as whole words, ignoring commas of thousands."""
    plain = _THOUSANDS.sub("", text)
    return tuple(c for c in candidates if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", plain))


def score_answer(answer: Answer) -> ItemScore:
    metadata, text = answer.metadata, without_reasoning(answer.text)
    references = tuple(metadata["references"])
    right = named(text, references)
    return ItemScore(
        answer.key,
        Cell(metadata["task"], metadata["length"], metadata["depth"]),
        references,
        tuple(reference in right for reference in references),
        named(text, metadata["others"]),
        answer,
    )


@dataclass(frozen=True)
class Step:
    """Flips between one length and the shortest, over their common items."""

    base: int
    length: int
    passed: int
    total: int
    worse: int
    better: int
    p: float


def steps(scores: Sequence[ItemScore]) -> list[Step]:
    """Compare every length of a paired run with the shortest, including itself."""
    by_length: dict[int, dict[str, bool]] = {}
    for score in scores:
        # the part of the key that all lengths share: task, depth, trial
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
    """Describe the result of the steps in words.

    Lengths are tested together (Bonferroni).

    Args:
        max_tokens: maximum length of an answer. A dense prompt may have an answer with a sparse
            end.
    """
    every = steps(scores)
    beyond = [step for step in every if step.length > index_topk]
    if not beyond or every[0].base > index_topk:
        return "No lengths on both sides of index_topk: the results do not cover it."
    base, passed = every[0].base, every[0].passed
    if not passed:
        return (
            f"No item passes even at {base} tokens, where attention is dense: this does not "
            "test selection."
        )
    limit = ALPHA / (len(every) - 1)
    for step in every:
        if step.worse > step.better and step.p < limit:
            return _fall(step, index_topk, max_tokens)
    shown = beyond[0]
    if shown.worse:
        unseen = "The difference is inside the noise of so many items."
    else:
        share = 100 * max_unseen_share(passed)
        unseen = f"What breaks fewer than {share:.1f} % of the items could be missed."
    return (
        f"No step at index_topk ({index_topk}): against {base} tokens, at {shown.length} "
        f"{shown.worse} of {shown.total} items got worse and {shown.better} better. {unseen}"
    )


def _fall(step: Step, index_topk: int, max_tokens: int) -> str:
    """Describe the shortest length with a significant loss, and its possible cause."""
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


@dataclass(frozen=True)
class Results:
    """The scored answers of a run, in the plan's order.

    Attributes:
        index_topk: None if unknown.
    """

    settings: RunSettings
    plan: Plan
    scores: Sequence[ItemScore]
    index_topk: int | None

    def of(self, task: str, length: int | None = None) -> list[ItemScore]:
        """Return the scores of a task, at one length or at all lengths."""
        return [s for s in self.scores if s.cell.task == task and length in (None, s.cell.length)]

    def label(self, length: int) -> str:
        """Return a length as text, marked if attention is dense."""
        dense = self.index_topk is not None and length <= self.index_topk
        return f"{length} (dense)" if dense else str(length)

    @property
    def length_differences(self) -> Counter[int]:
        """Difference of the server's and our token count -> number of prompts."""
        counts = [(s.answer.prompt_tokens, s.cell.length) for s in self.scores]
        return Counter(theirs - ours for theirs, ours in counts if theirs is not None)


def files(results: Results) -> dict[str, str]:
    """Return the files of the run's folder, name -> text: scores and report."""
    tables = [_by_depth(results, task) for task in results.plan.tasks]
    settings = settings_table(results.settings)
    sections = [*parts(results), *tables, *_failures(results), settings]
    return {
        SCORES_FILE: as_json(_json(results)),
        REPORT_FILE: page(f"Retrieval: {results.settings.model}", sections),
    }


def parts(results: Results) -> list[str | Table]:
    """Return the parts for the terminal: settings, table by length, verdicts."""
    plan, topk = results.plan, results.index_topk
    found: list[str | Table] = [_about(results), _by_length(results), _length_check(results)]
    cut = sum(score.answer.finish_reason == "length" for score in results.scores)
    if cut:
        found.append(
            f"{cut} of {len(results.scores)} answers were cut after {plan.max_tokens} tokens; "
            "--max-tokens allows more."
        )
    if plan.paired and topk is not None:
        found += [_continuity(results), verdict(results.scores, topk, plan.max_tokens)]
    return found


def _about(results: Results) -> str:
    plan, topk = results.plan, results.index_topk
    selects = "" if topk is None else f" index_topk is {topk}: longer prompts are sparse."
    depths = ", ".join(f"{100 * depth:g}" for depth in plan.depths)
    return (
        f"Model `{results.settings.model}`, {len(results.scores)} answers; seed "
        f"{plan.seed}, {plan.trials} prompts a cell, depths {depths} "
        f"%; {KEYS} keys, {CHAINS} chains of {HOPS + 1} "
        "variables. Passed: the answer names all requested values and no other value of the "
        f"text. Intervals: Wilson, 95 %.{selects}"
    )


def _by_length(results: Results) -> Table:
    """Return a table of passed items by task and length, over all depths.

    Tasks whose mean share differs have it in an extra column.
    """
    plan = results.plan
    lists = [task for task in plan.tasks if any(s.share != s.passed for s in results.of(task))]
    columns = ["tokens"]
    for task in plan.tasks:
        columns += [task, "named, %"] if task in lists else [task]
    rows = []
    for length in plan.lengths:
        row = [results.label(length)]
        for task in plan.tasks:
            scores = results.of(task, length)
            row.append(wilson(sum(s.passed for s in scores), len(scores)).percent())
            if task in lists:
                row.append(f"{100 * sum(s.share for s in scores) / len(scores):.1f}")
        rows.append(tuple(row))
    note = "named: share of the strings that were asked for, RULER's score; it forgives others."
    title = "By length: passed, % with interval"
    return Table(title, tuple(columns), tuple(rows), (note,) if lists else ())


def _by_depth(results: Results, task: str) -> Table:
    """Return a table of passed and tried items of a task, by depth and length."""
    rows = []
    for depth in results.plan.depths:
        cells = [f"{100 * depth:g} %"]
        for length in results.plan.lengths:
            passed = [s.passed for s in results.of(task, length) if s.cell.depth == depth]
            cells.append(f"{sum(passed)}/{len(passed)}")
        rows.append(tuple(cells))
    title = f"{task}: passed / tried by depth and tokens"
    return Table(title, ("depth", *map(results.label, results.plan.lengths)), tuple(rows))


def _length_check(results: Results) -> str:
    differences = results.length_differences
    compared = differences.total()
    if not compared:
        return "The server reports no prompt tokens, so lengths are by the local tokenizer."
    low, high = min(differences), max(differences)
    if low == high == 0:
        return f"The server counts the same lengths ({compared} prompts)."
    if low == high:
        return (
            f"The server counts {low:+d} tokens in every prompt ({compared}): its chat template is "
            "another one; add that to the lengths."
        )
    return (
        f"WARNING: the server counts {low:+d} to {high:+d} tokens against ours, not always the "
        "same: this tokenizer is not the served model's, the lengths are wrong; give its folder "
        "with --tokenizer."
    )


def _failures(results: Results) -> list[Table]:
    """Return a table of some wrong answers of each task."""
    wrong = [score for score in results.scores if not score.passed]
    rows = []
    for task in results.plan.tasks:
        own = [score for score in wrong if score.cell.task == task]
        for score in own[:: max(1, -(-len(own) // _SHOWN_FAILURES))]:
            rows.append((score.key, ", ".join(score.wanted), shown(score.answer.text)))
    title = f"{len(rows)} of the {len(wrong)} answers that did not pass"
    columns = ("task/length/depth/trial", "expected", "answer")
    return [Table(title, columns, tuple(rows))] if wrong else []


def _continuity(results: Results) -> Table:
    found = steps(results.scores)
    rows = []
    for step in found:
        flips = ("-",) * 3
        if step.base != step.length:
            flips = str(step.worse), str(step.better), f"{step.p:.3g}"
        passed = wilson(step.passed, step.total).percent()
        rows.append((results.label(step.length), passed, *flips))
    columns = ("tokens", "passed %", "worse", "better", "McNemar p")
    title = f"Across index_topk: the same items at every length, against {found[0].base} tokens"
    return Table(title, columns, tuple(rows))


def _json(results: Results) -> dict[str, Any]:
    cells = dict.fromkeys(score.cell for score in results.scores)
    differences = sorted(results.length_differences.items())
    data: dict[str, Any] = {
        "settings": asdict(results.settings),
        "index_topk": results.index_topk,
        "length_check": {
            "compared": results.length_differences.total(),
            "server_minus_ours": {str(key): count for key, count in differences},
        },
        "metrics": {task: _numbers(results.of(task)) for task in results.plan.tasks},
        "cells": [
            {**asdict(cell), **_numbers([s for s in results.scores if s.cell == cell])}
            for cell in cells
        ],
        "prompts": [score.to_json() for score in results.scores],
    }
    if results.plan.paired:
        data["continuity"] = [asdict(step) for step in steps(results.scores)]
    return data


def _numbers(scores: Sequence[ItemScore]) -> dict[str, Any]:
    passed, total = sum(score.passed for score in scores), len(scores)
    share = sum(score.share for score in scores) / total
    shares = wilson(passed, total)._asdict()
    return {"passed": passed, "total": total, **shares, "mean_share": share}
