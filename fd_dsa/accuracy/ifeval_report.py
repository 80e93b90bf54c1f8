"""The report of one IFEval run: four metrics with intervals, types, settings, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fd_dsa.accuracy import plots, report
from fd_dsa.accuracy.report import Table
from fd_dsa.accuracy.scores import Scores, by_type, metrics
from fd_dsa.accuracy.stats import wilson
from fd_dsa.accuracy.types import (
    INST_LOOSE,
    INST_STRICT,
    PROMPT_LOOSE,
    PROMPT_STRICT,
    REPORT_FILE,
    SCORES_FILE,
    RunSettings,
)

PICTURE_FILE = "ifeval.svg"
MOST_CUT_SHARE = 0.02
"""Above this share of answers cut at max_tokens, a report warns."""

_HOW = (
    "Intervals are of 95 %: Wilson's for prompts and types, a bootstrap over prompts for the "
    "instruction-level metrics, since instructions of one prompt pass or fail together."
)


def write_report(out: Path, scores: Scores, notes: Sequence[str] = ()) -> list[Path]:
    """Write `scores.json`, `report.md` and the picture; all of them or none.

    Args:
        out: folder of the run.
        notes: lines of the run and of the scorer that a reader has to know.

    Returns:
        The paths.
    """
    text = "IFEval: the four metrics and the types of instructions, with 95 % intervals"
    parts = [*_parts(scores, notes), report.picture(PICTURE_FILE, text), _settings(scores.settings)]
    files = {
        SCORES_FILE: scores.to_json(),
        REPORT_FILE: report.page(f"IFEval: {scores.settings.model}", parts),
        PICTURE_FILE: _picture(scores),
    }
    report.write_files(out, files)
    return [out / name for name in files]


def show_report(scores: Scores, notes: Sequence[str] = ()) -> None:
    """The same tables on the terminal."""
    report.show(_parts(scores, notes))


def cut_warning(scores: Scores, which: str = "") -> str | None:
    """A line where more answers than `MOST_CUT_SHARE` ended at max_tokens; None else.

    Args:
        which: put behind "answers", as in " of before".
    """
    cut = sum(score.finish_reason == "length" for score in scores.prompts)
    if cut <= MOST_CUT_SHARE * len(scores.prompts):
        return None
    return (
        f"Warning: {cut} of {len(scores.prompts)} answers{which} were cut at max_tokens "
        f"{scores.settings.max_tokens} (finish_reason length); a cut answer often fails."
    )


def _parts(scores: Scores, notes: Sequence[str]) -> list[str | Table]:
    """Tables and notes, in order."""
    rows = tuple(
        (name, f"{m.passed}/{m.total}", report.percent(m.share))
        for name, m in metrics(scores.prompts).items()
    )
    types = tuple(
        (
            name,
            str(found.total),
            report.percent(wilson(found.strict, found.total)),
            report.percent(wilson(found.loose, found.total)),
        )
        for name, found in by_type(scores.prompts).items()
    )
    title = f"IFEval, {len(scores.prompts)} prompts"
    warning = cut_warning(scores)
    return [
        Table(title, ("metric", "passed", "% [95 % interval]"), rows, (_HOW,)),
        *notes,
        *([warning] if warning else []),
        Table("By type of instruction", ("type", "number", "strict, %", "loose, %"), types),
    ]


def _settings(settings: RunSettings) -> Table:
    """The settings that decide answers; the address says nothing about them."""
    known: dict[str, Any] = settings.to_json()
    server, task = known.pop("server"), known.pop("task_settings")
    known.pop("base_url")
    if settings.thinking is None:
        known["thinking"] = "default of the chat template"
    found = {**known, **task, **{f"server: {name}": value for name, value in server.items()}}
    rows = tuple((name, "unknown" if v is None else str(v)) for name, v in found.items())
    return Table("Settings", ("setting", "value"), rows)


def _picture(scores: Scores) -> str:
    """Metrics and types as bars."""
    found = metrics(scores.prompts)
    levels = {
        "prompts": {"strict": found[PROMPT_STRICT].share, "loose": found[PROMPT_LOOSE].share},
        "instructions": {"strict": found[INST_STRICT].share, "loose": found[INST_LOOSE].share},
    }
    types = {
        f"{name} ({row.total})": {
            "strict": wilson(row.strict, row.total),
            "loose": wilson(row.loose, row.total),
        }
        for name, row in by_type(scores.prompts).items()
    }
    return plots.bars({"All": levels, "By type of instruction (number)": types})
