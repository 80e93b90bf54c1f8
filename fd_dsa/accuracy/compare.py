"""`compare`: compares two runs on the same prompts and gives a verdict."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fd_dsa.accuracy.paired import PROMPTS, Comparison, Flip, compare
from fd_dsa.accuracy.scores import PROMPT_STRICT, cut_warning, read_scores
from fd_dsa.accuracy.stats import (
    ALPHA,
    RESAMPLES,
    SEED,
    Estimate,
    max_unseen_share,
    mcnemar,
    signed,
    smallest_difference,
)
from fd_dsa.command_line import report
from fd_dsa.command_line.parser import Parser
from fd_dsa.command_line.report import Table

JSON_FILE, PAGE_FILE = "compare.json", "compare.md"
# limit for the list of flips on the terminal; the files have all flips
_SHOWN_FLIPS = 20
FLIP_RATES = (0.02, 0.05, 0.10)
"""Flip rates for which the smallest detectable difference is computed."""


def fill_parser(parser: Parser) -> None:
    parser.description = (
        "Compare two runs on the same prompts: flips, exact test, intervals, verdict. BEFORE and "
        "AFTER are folders of scored runs, or their scores.json."
    )
    parser.set_defaults(run=run)
    parser.add_argument("before", metavar="BEFORE", help="first run")
    parser.add_argument("after", metavar="AFTER", help="second run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write JSON and page here")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FIELD",
        help=f"compare although FIELD differs; `{PROMPTS}`: on the common ones; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Compare and report. Returns 0 for any verdict."""
    if args.out is not None:
        report.check_folder(args.out)
    paths = Path(args.before), Path(args.after)
    before, after = map(read_scores, paths)
    found = compare(before, after, args.allow)
    names = _names(*paths)
    report.show(parts(found, names, _SHOWN_FLIPS))
    if args.out is not None:
        page = report.page(f"{names[0]} and {names[1]}", parts(found, names))
        files = {JSON_FILE: report.as_json(_json(found, names)), PAGE_FILE: page}
        report.write_files(args.out, files)
        report.show([f"Written to {args.out}: {', '.join(files)}"])
    return 0


def _names(before: Path, after: Path) -> tuple[str, str]:
    """Return the names of the runs: their folders, or before and after if equal."""
    one, two = ((p if p.is_dir() else p.parent).resolve().name for p in (before, after))
    return ("before", "after") if one == two else (one, two)


def parts(
    found: Comparison, names: tuple[str, str], max_flips: int | None = None
) -> list[str | Table]:
    """Return verdict, warnings and tables."""
    first, *others = verdict(found)
    return [
        f"**Verdict.** {first}",
        *others,
        *_warnings(found),
        _metric_table(found, names),
        *_flip_table(found.flips, max_flips),
        _setting_part(found),
    ]


def _warnings(found: Comparison) -> list[str]:
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
    if any((run.settings.temperature or 0) > 0 for run in (found.before, found.after)):
        lines.append("Warning: temperature above 0: flips are also draws, not only the change.")
    cuts = (cut_warning(found.before, " of before"), cut_warning(found.after, " of after"))
    return lines + [line for line in cuts if line]


def _metric_table(found: Comparison, names: tuple[str, str]) -> Table:
    rows = []
    for name, change in found.metrics.items():
        sides = [
            f"{side.passed}/{side.total} = {100 * side.share.value:.2f}"
            for side in (change.before, change.after)
        ]
        p = "-" if change.p is None else p_digits(change.p)
        flips = str(change.worse), str(change.better)
        rows.append((name, *sides, change.difference.points(), *flips, p))
    notes = (
        f"The primary metric, named before any run, is {PROMPT_STRICT}; the others are strongly "
        "correlated with it and no further evidence. Differences in points with 95 % intervals: of "
        "prompts from their flips, of instructions by bootstrap over prompts "
        f"({RESAMPLES:,} resamples, seed {SEED}). p: exact McNemar, on the prompt level only, "
        "since instructions of one prompt are not independent.",
    )
    heading = ("metric", names[0], names[1], "difference", "worse", "better", "p")
    return Table("Metrics, %", heading, tuple(rows), notes)


def _flip_table(flips: Sequence[Flip], max_flips: int | None) -> list[Table]:
    """Return a table of prompts whose strict result changed, worse ones at the top.

    The list is empty without flips.
    """
    if not flips:
        return []
    ordered = sorted(flips, key=lambda flip: flip.better)
    same = {True: "same", False: "differs", None: "unknown"}
    rows = tuple(
        (f.key, "better" if f.better else "worse", ", ".join(f.instructions), same[f.same_answer])
        for f in ordered[:max_flips]
    )
    left = len(ordered) - len(rows)
    notes = (f"{left} more: --out writes all.",) if left else ()
    heading = ("key", "after is", "instructions that changed", "answer")
    return [Table(f"Prompts that flipped, strict: {len(flips)}", heading, rows, notes)]


def _setting_part(found: Comparison) -> str | Table:
    if not found.settings:
        return "All recorded settings are the same in both runs."
    rows = tuple((change.name, str(change.before), str(change.after)) for change in found.settings)
    return Table("Settings that differ", ("setting", "before", "after"), rows)


def _json(found: Comparison, names: tuple[str, str]) -> dict[str, Any]:
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
        "metrics": {name: change.to_json() for name, change in found.metrics.items()},
        "flips": [asdict(flip) for flip in found.flips],
        "settings": [asdict(change) for change in found.settings],
    }


def verdict(found: Comparison) -> list[str]:
    """Return sentences, beginning with the conclusion."""
    if found.same_answers == found.prompts:
        return [
            f"Equal, answer by answer: all {counted(found.prompts, 'answer')} have the same "
            "SHA-256 in both runs. This is the strongest possible result: no answer to these "
            "prompts changed, so no statistics are needed.",
            *_scorer(found),
        ]
    known = found.prompts - found.unknown_answers
    answers = f"{known - found.same_answers} of {counted(known, 'answer')} differ in their text"
    if found.unknown_answers:
        answers += f"; {counted(found.unknown_answers, 'answer')} cannot be compared, hash missing"
    return [*_tested(found), f"{answers}.", _visible(found), *_scorer(found)]


def counted(number: int, thing: str) -> str:
    """Format a count, as in `1 prompt`, `2 prompts`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def p_digits(p: float) -> str:
    """Format a p value with two digits, as in `0.031`, or as a bound if very small."""
    return "< 0.0001" if p < 0.0001 else f"{p:#.2g}"


def _visible(found: Comparison) -> str:
    when = {rate: f"if {100 * rate:.0f} % flip" for rate in FLIP_RATES}
    if found.flip_rate > 0:
        when[found.flip_rate] = f"at the observed {100 * found.flip_rate:.1f} %"
    sizes = []
    for rate, words in when.items():
        size = smallest_difference(found.prompts, rate)
        sizes.append(f"{'none' if size is None else f'{100 * size:.1f} points'} {words}")
    # flips that are all in one direction
    min_flips = next(flips for flips in range(1, 100) if mcnemar(0, flips) <= ALPHA)
    return (
        f"The smallest difference that {counted(found.prompts, 'prompt')} can show with 80 % "
        f"power: {', '.join(sizes)}. Fewer than {min_flips} net flips "
        f"({100 * min_flips / found.prompts:.1f} points) are never significant."
    )


def _tested(found: Comparison) -> list[str]:
    """Return sentences about flips, exact test and interval of the primary metric."""
    change = found.primary
    assert change.p is not None
    if change.worse + change.better == 0:
        share = 100 * max_unseen_share(found.prompts)
        return [
            "No change: no prompt changed its strict result. At most "
            f"{share:.2g} % of such prompts change theirs (95 % confidence)."
        ]
    value, low, high = map(signed, change.difference)
    digits = p_digits(change.p)
    p = f"p {digits}" if digits.startswith("<") else f"p = {digits}"
    flips = (
        f"of {counted(found.prompts, 'prompt')}, {change.worse} got worse and {change.better} got "
        f"better ({p}, exact McNemar); the difference is {value} points, 95 % interval {low} to "
        f"{high}"
    )
    if change.p > ALPHA:
        return [f"No difference shown: {flips}.", _not_excluded(change.difference)]
    return [f"After is {'worse' if change.worse > change.better else 'better'}: {flips}."]


def _not_excluded(difference: Estimate) -> str:
    """Describe the differences that the interval does not exclude."""
    if not difference.low <= 0 <= difference.high:
        return "Borderline: the interval leaves zero out, the exact test, which decides, does not."
    loss, gain = (f"{100 * part:.1f}" for part in (-difference.low, difference.high))
    return (
        f"That is no proof of equality: a loss of up to {loss} points and a gain of up to {gain} "
        "points fit these runs."
    )


def _scorer(found: Comparison) -> list[str]:
    """Return a warning if equal answers were scored differently."""
    keys = [flip.key for flip in found.flips if flip.same_answer]
    if not keys:
        return []
    return [
        f"Warning: {counted(len(keys), 'prompt')} got another result for the same answer (key "
        f"{', '.join(keys)}): the scoring differs there, not the model; score both runs again."
    ]
