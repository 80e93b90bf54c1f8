"""The report of a comparison: verdict, warnings, tables, a picture, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fd_dsa.accuracy import plots, report
from fd_dsa.accuracy.ifeval_report import cut_warning
from fd_dsa.accuracy.paired import Comparison, Flip
from fd_dsa.accuracy.report import Table
from fd_dsa.accuracy.scores import estimate_json, metric_json
from fd_dsa.accuracy.stats import RESAMPLES, SEED, smallest_difference
from fd_dsa.accuracy.types import PROMPT_STRICT
from fd_dsa.accuracy.verdict import FLIP_RATES, counted, flip_rate, p_digits, verdict

JSON_FILE, PAGE_FILE, PICTURE_FILE = "compare.json", "compare.md", "compare.svg"


def files(found: Comparison, names: tuple[str, str]) -> dict[str, str]:
    """Name -> text of the three files of a comparison.

    Args:
        names: of the two runs, as a reader knows them.
    """
    text = "Both runs: the four metrics, and their differences with 95 % intervals"
    shown = [*parts(found, names), report.picture(PICTURE_FILE, text)]
    changes = {
        name: (change.before.share, change.after.share, change.difference)
        for name, change in found.metrics.items()
    }
    return {
        JSON_FILE: report.as_json(_json(found, names)),
        PAGE_FILE: report.page(f"{names[0]} and {names[1]}", shown),
        PICTURE_FILE: plots.before_after(changes, names=names),
    }


def parts(found: Comparison, names: tuple[str, str], most: int | None = None) -> list[str | Table]:
    """Verdict, warnings, tables.

    Args:
        names: of the two runs.
        most: rows of the list of flips, and then only types that changed; None for all.
    """
    first, *others = verdict(found)
    return [
        f"**Verdict.** {first}",
        *others,
        *_warnings(found),
        _metric_table(found, names),
        *_flip_table(found.strict, most),
        *_type_table(found, changed_only=most is not None),
        *_setting_table(found),
    ]


def _warnings(found: Comparison) -> list[str]:
    """What makes the comparison weaker than it looks."""
    lines = []
    for change in found.settings:
        values = f"{change.before!r} before, {change.after!r} after"
        if change.decisive:
            lines.append(f"Warning: {change.name}: {values}; allowed, but not done alike.")
        elif change.batching and found.same_answers < found.prompts:
            lines.append(
                f"Warning: {change.name}: {values}; greedy tokens may depend on the batch, so "
                "flips may come from that alone."
            )
    if found.only_before or found.only_after:
        lines.append(
            f"Warning: prompts: {found.only_before} only before, {found.only_after} only after, "
            f"left out; {found.prompts} compared."
        )
    if max(found.before.settings.temperature, found.after.settings.temperature) > 0:
        lines.append("Warning: temperature above 0: flips are also draws, not only the change.")
    cuts = (cut_warning(found.before, " of before"), cut_warning(found.after, " of after"))
    return lines + [line for line in cuts if line]


def _metric_table(found: Comparison, names: tuple[str, str]) -> Table:
    """The four metrics."""
    rows = []
    for name, change in found.metrics.items():
        sides = (change.before, change.after)
        rows.append(
            (
                name,
                *(f"{side.passed}/{side.total} = {100 * side.share.value:.2f}" for side in sides),
                report.points(change.difference),
                str(change.worse),
                str(change.better),
                "-" if change.p is None else p_digits(change.p),
            )
        )
    notes = (
        f"The primary metric, named before any run, is {PROMPT_STRICT}; the others are strongly "
        "correlated with it and no further evidence. Differences in points with 95 % intervals by "
        f"bootstrap over prompts ({RESAMPLES:,} resamples, seed {SEED}), which are too narrow "
        "where only a handful of prompts flip: the verdict's interval is made from the flips. p: "
        "exact McNemar, on the prompt level only, since instructions of one prompt are not "
        "independent.",
    )
    heading = ("metric", names[0], names[1], "difference", "worse", "better", "p")
    return Table("Metrics, %", heading, tuple(rows), notes)


def _flip_table(flips: Sequence[Flip], most: int | None) -> list[str | Table]:
    """Prompts whose strict result changed, those that got worse first; nothing without any."""
    if not flips:
        return []
    ordered = sorted(flips, key=lambda flip: flip.better)
    same = {True: "same", False: "differs", None: "unknown"}
    rows = tuple(
        (f.key, "better" if f.better else "worse", ", ".join(f.instructions), same[f.same_answer])
        for f in ordered[:most]
    )
    left = len(ordered) - len(rows)
    notes = (f"{left} more: --out writes all.",) if left else ()
    heading = ("key", "after is", "instructions that changed", "answer")
    return [Table(f"Prompts that flipped, strict: {len(flips)}", heading, rows, notes)]


def _type_table(found: Comparison, changed_only: bool) -> list[str | Table]:
    """Types of instructions; nothing where only changed ones are wanted and none is."""
    rows = tuple(
        (name, *map(str, (t.total, t.before, t.after, t.worse, t.better)))
        for name, t in found.types.items()
        if t.worse or t.better or not changed_only
    )
    if not rows:
        return []
    note = (
        f"Of {counted(len(found.types), 'type')} one may stand out by chance: a place to look, "
        "not a finding."
    )
    left = f"{counted(len(found.types) - len(rows), 'type')} without a change left out."
    notes = (note, left) if len(rows) < len(found.types) else (note,)
    heading = ("type", "number", "before", "after", "worse", "better")
    return [Table("By type of instruction, followed strictly", heading, rows, notes)]


def _setting_table(found: Comparison) -> list[str | Table]:
    """Recorded settings that differ."""
    if not found.settings:
        return ["All recorded settings are the same in both runs."]
    rows = tuple((change.name, str(change.before), str(change.after)) for change in found.settings)
    return [Table("Settings that differ", ("setting", "before", "after"), rows)]


def _json(found: Comparison, names: tuple[str, str]) -> dict[str, Any]:
    """The comparison as a JSON object, in percent and points."""
    rates = [flip_rate(found), *FLIP_RATES]
    least = {f"{100 * r:.4g}": smallest_difference(found.prompts, r) for r in rates}
    return {
        "names": {"before": names[0], "after": names[1]},
        "verdict": verdict(found),
        "warnings": _warnings(found),
        "primary": PROMPT_STRICT,
        "prompts": {
            "common": found.prompts,
            "only_before": found.only_before,
            "only_after": found.only_after,
        },
        "answers": {"same": found.same_answers, "unknown": found.unknown_answers},
        "metrics": {
            name: {
                "before": metric_json(change.before),
                "after": metric_json(change.after),
                "difference": estimate_json(change.difference),
                "paired": None if change.paired is None else estimate_json(change.paired),
                "worse": change.worse,
                "better": change.better,
                "p": change.p,
            }
            for name, change in found.metrics.items()
        },
        "smallest_difference_by_flip_rate": {
            rate: None if size is None else round(100 * size, 2) for rate, size in least.items()
        },
        "flips": {
            "strict": [asdict(flip) for flip in found.strict],
            "loose": [asdict(flip) for flip in found.loose],
        },
        "types": {name: asdict(change) for name, change in found.types.items()},
        "settings": [asdict(change) for change in found.settings],
    }
