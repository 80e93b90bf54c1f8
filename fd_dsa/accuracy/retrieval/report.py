"""Tables of a retrieval run: by length, by depth and length, across index_topk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fd_dsa.accuracy.retrieval.plan import Plan
from fd_dsa.accuracy.retrieval.scoring import ItemScore, steps, verdict
from fd_dsa.accuracy.retrieval.tasks import CHAINS, HOPS, KEYS
from fd_dsa.accuracy.scores import settings_table
from fd_dsa.accuracy.stats import wilson
from fd_dsa.accuracy.types import REPORT_FILE, SCORES_FILE, RunSettings, shown
from fd_dsa.client.report import Table, as_json, page

_SHOWN_FAILURES = 5


@dataclass(frozen=True)
class Results:
    """The answers of a run, scored, in the plan's order; `index_topk` is None where unknown."""

    settings: RunSettings
    plan: Plan
    scores: Sequence[ItemScore]
    index_topk: int | None

    def of(self, task: str, length: int | None = None) -> list[ItemScore]:
        """The scores of a task, at one length or at all."""
        return [s for s in self.scores if s.cell.task == task and length in (None, s.cell.length)]

    def label(self, length: int) -> str:
        """A length, marked where attention is dense."""
        dense = self.index_topk is not None and length <= self.index_topk
        return f"{length} (dense)" if dense else str(length)

    @property
    def length_differences(self) -> Counter[int]:
        """Tokens that the server counts more than we do -> number of prompts."""
        counts = [(s.answer.prompt_tokens, s.cell.length) for s in self.scores]
        return Counter(theirs - ours for theirs, ours in counts if theirs is not None)


def files(results: Results) -> dict[str, str]:
    """The files of the run's folder, name -> text: scores and report."""
    tables = [_by_depth(results, task) for task in results.plan.tasks]
    settings = settings_table(results.settings)
    sections = [*parts(results), *tables, *_failures(results), settings]
    return {
        SCORES_FILE: as_json(_json(results)),
        REPORT_FILE: page(f"Retrieval: {results.settings.model}", sections),
    }


def parts(results: Results) -> list[str | Table]:
    """What the terminal shows: what was run, the table by length, the verdicts."""
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
    """One paragraph: model, wording, sizes, what counts."""
    plan, topk = results.plan, results.index_topk
    selects = "" if topk is None else f" index_topk is {topk}: longer prompts are sparse."
    depths = ", ".join(f"{100 * depth:g}" for depth in plan.depths)
    return (
        f"Model `{results.settings.model}`, {len(results.scores)} answers; seed "
        f"{plan.seed}, {plan.trials} prompts a cell, depths {depths} "
        f"%; {KEYS} keys, {CHAINS} chains of {HOPS + 1} "
        "variables. Passed: the answer names all that is asked for and nothing else that the text "
        f"hides. Intervals: Wilson, 95 %.{selects}"
    )


def _by_length(results: Results) -> Table:
    """Passed items of every task at every length, over all depths; mean share where it differs."""
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
    """Passed of tried items of a task, a row for each depth, a column for each length."""
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
    """A sentence: does the server count the tokens that we count?"""
    differences = results.length_differences
    compared = differences.total()
    if not compared:
        return "The server does not say how many tokens a prompt has: lengths are ours alone."
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
    """Some wrong answers of each task, to see what kind they are."""
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
    """The same items at every length, against the first."""
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
    """Content of `scores.json`."""
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
    """Counts, share of passed items with its interval, mean share."""
    passed, total = sum(score.passed for score in scores), len(scores)
    share = sum(score.share for score in scores) / total
    shares = wilson(passed, total)._asdict()
    return {"passed": passed, "total": total, **shares, "mean_share": share}
