"""Tables and pictures of a retrieval run: by length, by depth and length, across index_topk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fd_dsa.accuracy import plots
from fd_dsa.accuracy.report import Table, as_json, page, percent, picture
from fd_dsa.accuracy.retrieval.continuity import steps, verdict
from fd_dsa.accuracy.retrieval.plan import Cell, Plan
from fd_dsa.accuracy.retrieval.scoring import ItemScore, Tally, by_cell, tally
from fd_dsa.accuracy.retrieval.tasks import TITLES
from fd_dsa.accuracy.retrieval.tokens import LengthCheck
from fd_dsa.accuracy.stats import wilson
from fd_dsa.accuracy.types import REPORT_FILE, SCORES_FILE, RunSettings

_SHOWN_FAILURES = 5
_SHOWN_CHARS = 80


@dataclass(frozen=True)
class Results:
    """What a report is made of.

    Attributes:
        settings: of the run.
        plan: of its prompts.
        scores: of the answers that came, in the plan's order.
        lengths: our counts against the server's.
        index_topk: of the model; None where unknown.
    """

    settings: RunSettings
    plan: Plan
    scores: Sequence[ItemScore]
    lengths: LengthCheck
    index_topk: int | None

    def of(self, task: str, length: int | None = None) -> list[ItemScore]:
        """The scores of a task, at one length or at all."""
        return [s for s in self.scores if s.cell.task == task and length in (None, s.cell.length)]


def files(results: Results) -> dict[str, str]:
    """The files of the run's folder, name -> text: scores, report, a heat map for each task."""
    cells = by_cell(results.scores)
    pictures = {f"{task}.svg": _heat_map(results, cells, task) for task in results.plan.tasks}
    return {
        **pictures,
        SCORES_FILE: as_json(_json(results, cells)),
        REPORT_FILE: page(
            f"Retrieval: {results.settings.model}",
            [*parts(results), *_pictures(results), *_details(results), _settings(results)],
        ),
    }


def parts(results: Results) -> list[str | Table]:
    """What the terminal shows: what was run, the table by length, the verdicts."""
    found: list[str | Table] = [_about(results), _by_length(results)]
    found.append(results.lengths.in_words())
    cut = sum(score.answer.finish_reason == "length" for score in results.scores)
    if cut:
        found.append(
            f"{cut} of {len(results.scores)} answers were cut after {results.plan.max_tokens} "
            "tokens; --max-tokens allows more."
        )
    if results.plan.paired and results.index_topk is not None:
        said = verdict(results.scores, results.index_topk, results.plan.max_tokens)
        found += [_continuity(results), said]
    return found


def _about(results: Results) -> str:
    """One paragraph: model, wording, sizes, what counts."""
    plan, model = results.plan, results.settings.model
    topk = results.index_topk
    selects = "" if topk is None else f" index_topk is {topk}: longer prompts are sparse."
    depths = ", ".join(f"{100 * depth:g}" for depth in plan.depths)
    return (
        f"Model `{model}`, {len(results.scores)} answers; wording `{plan.wording.name}`, seed "
        f"{plan.seed}, {plan.trials} prompts a cell, depths {depths} %; {plan.sizes.keys} keys, "
        f"{plan.sizes.chains} chains of {plan.sizes.hops + 1} variables. Passed: the answer names "
        "all that is asked for and nothing else that the text hides. Intervals: Wilson, 95 %."
        + selects
    )


def _by_length(results: Results) -> Table:
    """Passed items of every task at every length, over all depths; mean share where it differs."""
    plan = results.plan
    lists = [task for task in plan.tasks if any(s.share != s.passed for s in results.of(task))]
    columns = [text for task in plan.tasks for text in _columns(task, task in lists)]
    rows = []
    for length in plan.lengths:
        row = [_length_label(length, results.index_topk)]
        for task in plan.tasks:
            sums = tally(results.of(task, length))
            row.append(percent(wilson(sums.passed, sums.total)))
            if task in lists:
                row.append(f"{100 * sums.mean_share:.1f}" if sums.total else "-")
        rows.append(tuple(row))
    notes = (
        "named: of the strings that were asked for, RULER's score; it forgives naming others.",
    )
    columns = ["tokens", *columns]
    title = "By length: passed, % with interval"
    return Table(title, tuple(columns), tuple(rows), notes if lists else ())


def _columns(task: str, has_share: bool) -> list[str]:
    """Headings of a task."""
    return [TITLES[task], "named, %"] if has_share else [TITLES[task]]


def _length_label(length: int, index_topk: int | None) -> str:
    """A length, marked where attention is dense."""
    return f"{length} (dense)" if index_topk is not None and length <= index_topk else str(length)


def _rows(plan: Plan, task: str, cells: Mapping[Cell, Tally]) -> list[float | None]:
    """Depths of a task's cells; None alone for a task without depth."""
    if any(cell.task == task and cell.depth is None for cell in cells):
        return [None]
    return list(plan.depths)


def _heat_map(results: Results, cells: Mapping[Cell, Tally], task: str) -> str:
    """SVG of one task: depth from top to bottom, length from left to right."""
    plan = results.plan
    depths = _rows(plan, task, cells)
    none = Tally(0, 0, 0.0)
    grid = [[cells.get(Cell(task, n, depth), none) for n in plan.lengths] for depth in depths]
    return plots.heat_map(
        [[sums.passed for sums in row] for row in grid],
        [[sums.total for sums in row] for row in grid],
        rows=["any" if depth is None else f"{100 * depth:g} %" for depth in depths],
        columns=[str(length) for length in plan.lengths],
        title=f"{TITLES[task]}: {results.settings.model}",
        row_label="depth in the haystack",
        column_label="tokens of the prompt"
        + ("" if results.index_topk is None else f" (index_topk {results.index_topk})"),
    )


def _pictures(results: Results) -> list[str]:
    """A line of Markdown for each heat map."""
    return [
        picture(f"{task}.svg", f"{TITLES[task]}: passed by depth and length")
        for task in results.plan.tasks
    ]


def _details(results: Results) -> list[Table | str]:
    """Some wrong answers of each task, so that one sees what kind they are."""
    wrong = [score for score in results.scores if not score.passed]
    shown: list[ItemScore] = []
    for task in results.plan.tasks:
        own = [score for score in wrong if score.cell.task == task]
        shown += own[:: max(1, -(-len(own) // _SHOWN_FAILURES))]
    rows = tuple((s.key, ", ".join(s.wanted), _shown(s.answer.text)) for s in shown)
    title = f"{len(shown)} of the {len(wrong)} answers that did not pass"
    return [Table(title, ("task/length/depth/trial", "wanted", "answer"), rows)] if wrong else []


def _shown(text: str) -> str:
    """The beginning of an answer in one line."""
    line = " ".join(text.split()).replace("`", "'")
    return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 3] + "..."


def _settings(results: Results) -> Table:
    """The settings that decide answers; the server's address says nothing about them."""
    known = results.settings.to_json()
    server, task = known.pop("server"), known.pop("task_settings")
    known.pop("base_url")
    task["wording"] = results.plan.wording.name
    task |= task.pop("sizes")
    found = {**known, **task, **{f"server: {name}": value for name, value in server.items()}}
    rows = tuple((name, "unknown" if v is None else str(v)) for name, v in found.items())
    return Table("Settings", ("setting", "value"), rows)


def _continuity(results: Results) -> Table:
    """The same items at every length, against the first."""
    found = steps(results.scores)
    rows = tuple(
        (
            _length_label(step.length, results.index_topk),
            percent(wilson(step.passed, step.total)),
            str(step.worse) if step.base != step.length else "-",
            str(step.better) if step.base != step.length else "-",
            f"{step.p:.3g}" if step.base != step.length else "-",
        )
        for step in found
    )
    columns = ("tokens", "passed %", "worse", "better", "McNemar p")
    title = f"Across index_topk: the same items at every length, against {found[0].base} tokens"
    return Table(title, columns, rows)


def _json(results: Results, cells: Mapping[Cell, Tally]) -> dict[str, Any]:
    """Content of `scores.json`."""
    data: dict[str, Any] = {
        "settings": results.settings.to_json(),
        "index_topk": results.index_topk,
        "length_check": results.lengths.to_json(),
        "metrics": {task: _numbers(tally(results.of(task))) for task in results.plan.tasks},
        "cells": [
            {"task": cell.task, "length": cell.length, "depth": cell.depth, **_numbers(sums)}
            for cell, sums in cells.items()
        ],
        "prompts": [score.to_json() for score in results.scores],
    }
    if results.plan.paired:
        data["continuity"] = [step.to_json() for step in steps(results.scores)]
    return data


def _numbers(sums: Tally) -> dict[str, Any]:
    """Counts, share of passed items with its interval, mean share."""
    if not sums.total:
        return {"passed": 0, "total": 0}
    result = wilson(sums.passed, sums.total)
    return {
        "passed": sums.passed,
        "total": sums.total,
        "value": result.value,
        "low": result.low,
        "high": result.high,
        "mean_share": sums.mean_share,
    }
