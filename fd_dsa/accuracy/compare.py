"""`compare`: pairs two scored runs by key, counts the flips and gives a verdict."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fd_dsa.accuracy.scores import (
    METRICS,
    PROMPT_LOOSE,
    PROMPT_STRICT,
    Metric,
    PromptScore,
    Scores,
    SettingChange,
    cut_warning,
    metric,
    read_scores,
    setting_changes,
    units,
)
from fd_dsa.accuracy.stats import (
    ALPHA,
    RESAMPLES,
    SEED,
    Estimate,
    bootstrap_difference,
    max_unseen_share,
    mcnemar,
    paired_difference,
    signed,
    smallest_difference,
)
from fd_dsa.command_line import report
from fd_dsa.command_line.parser import Parser
from fd_dsa.command_line.report import Table
from fd_dsa.errors import ConfigError, shorten

PROMPTS = "prompts"
"""Value of `--allow` that compares runs on their common prompts."""
FLIP_RATES = (0.02, 0.05, 0.10)
"""Flip rates for which the smallest detectable difference is computed."""

# limit for the list of flips on the terminal; the files have all flips
_SHOWN_FLIPS = 20
_PROMPT_FILE = "task_settings.prompts_sha256"
# settings that change the batches, and with them possibly the greedy tokens
_BATCHING = (
    "concurrency",
    "server.max_num_seqs",
    "server.max_num_batched_tokens",
    "server.target_inter_token_latency_ms",
    "server.enable_prefix_caching",
)


@dataclass(frozen=True)
class MetricChange:
    """A metric in both runs.

    Attributes:
        difference: after - before. On the prompt level it is computed from the flips, which is
            exact with few of them. On the instruction level it is a bootstrap over prompts.
        worse, better: number of prompts or instructions that passed only before, and only after.
        p: p value of the exact McNemar test. None on the instruction level, because instructions of
            one prompt are not independent.
    """

    before: Metric
    after: Metric
    difference: Estimate
    worse: int
    better: int
    p: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the change as a JSON object, in percent and points."""
        sides = {"before": self.before.to_json(), "after": self.after.to_json()}
        flips = {"worse": self.worse, "better": self.better, "p": self.p}
        return {**sides, "difference": self.difference.to_json(), **flips}


@dataclass(frozen=True)
class Flip:
    """A prompt whose strict result changed, with its changed instructions."""

    key: str
    better: bool
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The differences of two paired runs, on their common prompts in the first run's order."""

    before: Scores
    after: Scores
    metrics: dict[str, MetricChange]
    flips: tuple[Flip, ...]
    same_answers: int
    settings: tuple[SettingChange, ...]
    only_before: int
    only_after: int

    @property
    def prompts(self) -> int:
        return len(self.before.prompts)

    @property
    def primary(self) -> MetricChange:
        """The change of the primary metric, chosen before any run."""
        return self.metrics[PROMPT_STRICT]


def compare(before: Scores, after: Scores, allow: Collection[str] = ()) -> Comparison:
    """Pair two runs by key and count the changes.

    Args:
        allow: names of the settings that may differ.
    """
    first, second = before.by_key, after.by_key
    common = [key for key in first if key in second]
    sizes = f"prompts: {len(first)} before, {len(second)} after, {len(common)} in both"
    if not common:
        raise ConfigError(f"{sizes}; compare runs on the same prompts")
    if PROMPTS not in allow and not len(first) == len(second) == len(common):
        raise ConfigError(
            f"{sizes}; run the missing ones, or --allow {PROMPTS} to compare what both have"
        )
    changes = setting_changes(before.settings, after.settings)
    _check_settings(changes, allow, {PROMPTS, *before.settings.flat(), *after.settings.flat()})
    old, new = (tuple(scores[key] for key in common) for scores in (first, second))
    pairs = list(zip(old, new, strict=True))
    for one, other in pairs:
        if one.instruction_ids != other.instruction_ids:
            raise ConfigError(
                f"prompts: key {one.key!r} has instructions {', '.join(one.instruction_ids)} "
                f"before, {', '.join(other.instruction_ids)} after; the runs are over different "
                "prompt files"
            )
    return Comparison(
        before=replace(before, prompts=old),
        after=replace(after, prompts=new),
        metrics={name: metric_change(name, old, new) for name in METRICS},
        flips=tuple(_flip(*pair) for pair in pairs if pair[0].passed != pair[1].passed),
        same_answers=sum(one.answer_sha256 == other.answer_sha256 for one, other in pairs),
        settings=changes,
        only_before=len(first) - len(common),
        only_after=len(second) - len(common),
    )


def _check_settings(
    changes: Sequence[SettingChange], allow: Collection[str], known: Collection[str]
) -> None:
    """Raise ConfigError for an unknown name in `allow`, or a decisive setting not in it."""
    for name in allow:
        if name not in known:
            allowed = ", ".join(sorted(known))
            raise ConfigError(f"--allow: got {shorten(name)}; allowed are {allowed}")
    for change in changes:
        field = PROMPTS if change.name == _PROMPT_FILE else change.name
        if change.decisive and field not in allow:
            raise ConfigError(
                f"{change.name}: {change.before!r} before, {change.after!r} after; the runs were "
                f"not asked or scored alike; do one again, or --allow {field}"
            )


def metric_change(
    name: str, before: Sequence[PromptScore], after: Sequence[PromptScore]
) -> MetricChange:
    """Return the change of a metric between the scores of the same prompts, in the same order."""
    old, new = ([units(score, name) for score in scores] for scores in (before, after))
    pairs = [pair for rows in zip(old, new, strict=True) for pair in zip(*rows, strict=True)]
    worse, better = pairs.count((True, False)), pairs.count((False, True))
    sides = metric(before, name), metric(after, name)
    if name in (PROMPT_STRICT, PROMPT_LOOSE):
        difference = paired_difference(worse, better, len(before))
        return MetricChange(*sides, difference, worse, better, mcnemar(worse, better))
    counts = [sum(row) for row in old], [sum(row) for row in new], [len(row) for row in old]
    difference = bootstrap_difference(*counts)
    return MetricChange(*sides, difference, worse, better, None)


def _flip(before: PromptScore, after: PromptScore) -> Flip:
    rows = zip(before.instruction_ids, before.follow_strict, after.follow_strict, strict=True)
    return Flip(before.key, after.passed, tuple(name for name, x, y in rows if x != y))


def verdict(found: Comparison) -> list[str]:
    """Return sentences, beginning with the conclusion."""
    answers = f"{found.prompts} answers"
    if found.same_answers == found.prompts:
        return [
            f"Equal, answer by answer: all {answers} have the same SHA-256 in both runs. This is "
            "the strongest possible result: no answer to these prompts changed, so no statistics "
            "are needed."
        ]
    different = f"{found.prompts - found.same_answers} of {answers} differ in their text."
    return [*_tested(found), different, _visible(found)]


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
    flips = (
        f"of {found.prompts} prompts, {change.worse} got worse and {change.better} got better (p "
        f"{_digits(change.p, '= ')}, exact McNemar); the difference is {value} points, 95 % "
        f"interval {low} to {high}"
    )
    if change.p <= ALPHA:
        return [f"After is {'worse' if change.worse > change.better else 'better'}: {flips}."]
    if not change.difference.low <= 0 <= change.difference.high:
        return [
            f"No difference shown: {flips}.",
            "Borderline: the interval leaves zero out, the exact test, which decides, does not.",
        ]
    loss, gain = (f"{100 * part:.1f}" for part in (-change.difference.low, change.difference.high))
    return [
        f"No difference shown: {flips}.",
        f"That is no proof of equality: a loss of up to {loss} points and a gain of up to {gain} "
        "points fit these runs.",
    ]


def _digits(p: float, equals: str = "") -> str:
    """Format a p value with two digits, as in `0.031`, or as a bound if very small."""
    return "< 0.0001" if p < 0.0001 else f"{equals}{p:#.2g}"


def _visible(found: Comparison) -> str:
    """Describe the differences that the run could have shown."""
    when = {rate: f"if {100 * rate:.0f} % flip" for rate in FLIP_RATES}
    observed = (found.primary.worse + found.primary.better) / found.prompts
    if observed > 0:
        when[observed] = f"at the observed {100 * observed:.1f} %"
    sizes = []
    for rate, words in when.items():
        size = smallest_difference(found.prompts, rate)
        sizes.append(f"{'none' if size is None else f'{100 * size:.1f} points'} {words}")
    # flips that are all in one direction
    min_flips = next(flips for flips in range(1, 100) if mcnemar(0, flips) <= ALPHA)
    return (
        f"The smallest difference that {found.prompts} prompts can show with 80 % power: "
        f"{', '.join(sizes)}. Fewer than {min_flips} net flips "
        f"({100 * min_flips / found.prompts:.1f} points) are never significant."
    )


def fill_parser(parser: Parser) -> None:
    parser.description = (
        "Compare two runs on the same prompts: flips, exact test, intervals, verdict. BEFORE and "
        "AFTER are folders of scored runs, or their scores.json."
    )
    parser.set_defaults(run=run)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="first run")
    parser.add_argument("after", type=Path, metavar="AFTER", help="second run")
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
    found = compare(read_scores(args.before), read_scores(args.after), args.allow)
    runs = (path if os.path.isdir(path) else path.parent for path in (args.before, args.after))
    title = " and ".join(path.resolve().name for path in runs)
    page = report.page(title, _parts(found))
    files = {"compare.json": report.as_json(_json(found)), "compare.md": page}
    report.publish(_parts(found, _SHOWN_FLIPS), args.out, files)
    return 0


def _json(found: Comparison) -> dict[str, Any]:
    only = {"only_before": found.only_before, "only_after": found.only_after}
    return {
        "verdict": verdict(found),
        "warnings": _warnings(found),
        "primary": PROMPT_STRICT,
        "prompts": {"common": found.prompts, **only},
        "answers": {"same": found.same_answers},
        "metrics": {name: change.to_json() for name, change in found.metrics.items()},
        "flips": [asdict(flip) for flip in found.flips],
        "settings": [asdict(change) for change in found.settings],
    }


def _parts(found: Comparison, max_flips: int | None = None) -> list[str | Table]:
    """Return verdict, warnings and tables."""
    first, *others = verdict(found)
    settings: str | Table = "All recorded settings are the same in both runs."
    if found.settings:
        rows = tuple((c.name, str(c.before), str(c.after)) for c in found.settings)
        settings = Table("Settings that differ", ("setting", "before", "after"), rows)
    flips = [_flip_table(found.flips, max_flips)] if found.flips else []
    told = [f"**Verdict.** {first}", *others, *_warnings(found)]
    return [*told, _metric_table(found), *flips, settings]


def _warnings(found: Comparison) -> list[str]:
    lines = []
    for change in found.settings:
        values = f"{change.before!r} before, {change.after!r} after"
        if change.decisive:
            lines.append(f"Warning: {change.name}: {values}; allowed, but not done alike.")
        elif change.name in _BATCHING and found.same_answers < found.prompts:
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
    lines += cut_warning(found.before, " of before")
    return lines + cut_warning(found.after, " of after")


def _metric_table(found: Comparison) -> Table:
    rows = []
    for name, change in found.metrics.items():
        sides = [
            f"{side.passed}/{side.total} = {100 * side.share.value:.2f}"
            for side in (change.before, change.after)
        ]
        p = "-" if change.p is None else _digits(change.p)
        flips = str(change.worse), str(change.better)
        rows.append((name, *sides, change.difference.points(), *flips, p))
    notes = (
        f"The primary metric, named before any run, is {PROMPT_STRICT}; the others are strongly "
        "correlated with it and no further evidence. Differences in points with 95 % intervals: of "
        "prompts from their flips, of instructions by bootstrap over prompts "
        f"({RESAMPLES:,} resamples, seed {SEED}). p: exact McNemar, on the prompt level only, "
        "since instructions of one prompt are not independent.",
    )
    heading = ("metric", "before", "after", "difference", "worse", "better", "p")
    return Table("Metrics, %", heading, tuple(rows), notes)


def _flip_table(flips: Sequence[Flip], max_flips: int | None) -> Table:
    """Return a table of the prompts that flipped, worse ones at the top."""
    ordered = sorted(flips, key=lambda flip: flip.better)[:max_flips]
    rows = tuple(
        (flip.key, "better" if flip.better else "worse", ", ".join(flip.instructions))
        for flip in ordered
    )
    left = len(flips) - len(rows)
    notes = (f"{left} more: --out writes all.",) if left else ()
    heading = ("key", "after is", "instructions that changed")
    return Table(f"Prompts that flipped, strict: {len(flips)}", heading, rows, notes)
