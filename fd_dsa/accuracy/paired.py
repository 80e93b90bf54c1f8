"""Comparison of two scored runs on the same prompts, paired by key."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fd_dsa.accuracy.scores import (
    METRICS,
    PROMPT_LOOSE,
    PROMPT_STRICT,
    Metric,
    PromptScore,
    RunSettings,
    Scores,
    columns,
    metric,
)
from fd_dsa.accuracy.stats import Estimate, bootstrap_difference, mcnemar, paired_difference
from fd_dsa.errors import ConfigError

PROMPTS = "prompts"
"""Value of `allow` that compares runs on their common prompts."""

# settings that change the question; runs that differ here are not comparable
_DECISIVE = ("task", "max_tokens", "temperature", "thinking")
# names and numbers of prompts, ignored because the keys themselves are compared
_ABOUT_PROMPTS = tuple(f"task_settings.{n}" for n in ("prompts", "num_prompts", "prompts_in_file"))
_PROMPT_FILE = "task_settings.prompts_sha256"
# settings that change the batches, and with them possibly the greedy tokens
_BATCHING = (
    "concurrency",
    "server.max_num_seqs",
    "server.max_num_batched_tokens",
    "server.target_inter_token_latency_ms",
    "server.enable_prefix_caching",
)
_Pair = tuple[PromptScore, PromptScore]


@dataclass(frozen=True)
class SettingChange:
    """A recorded setting that differs, such as `max_tokens` or `server.kv_cache_dtype`."""

    name: str
    before: Any
    after: Any
    # the runs are not comparable, unless the setting is allowed by name
    decisive: bool
    # determines the requests that share a step
    batching: bool


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
        estimates = {n: getattr(self, n).to_json() for n in ("before", "after", "difference")}
        return estimates | {"worse": self.worse, "better": self.better, "p": self.p}


@dataclass(frozen=True)
class Flip:
    """A prompt whose result changed, with its changed instructions.

    Attributes:
        same_answer: True if both runs have the same text, so that only the scorer differs. None if
            unknown.
    """

    key: str
    better: bool
    instructions: tuple[str, ...]
    same_answer: bool | None


@dataclass(frozen=True)
class Comparison:
    """The differences of two paired runs, on their common prompts in the first run's order."""

    before: Scores
    after: Scores
    metrics: dict[str, MetricChange]
    flips: tuple[Flip, ...]
    same_answers: int
    unknown_answers: int
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

    @property
    def flip_rate(self) -> float:
        return (self.primary.worse + self.primary.better) / self.prompts


def compare(before: Scores, after: Scores, allow: Collection[str] = ()) -> Comparison:
    """Pair two runs by key and count the changes.

    Args:
        allow: names of the settings that may differ.
    """
    changes = setting_changes(before.settings, after.settings)
    _check_settings(changes, allow, {PROMPTS, *before.settings.flat(), *after.settings.flat()})
    first, second = before.by_key, after.by_key
    common = [key for key in first if key in second]
    _check_keys(len(first), len(second), len(common), PROMPTS in allow)
    pairs = [(first[key], second[key]) for key in common]
    for old, new in pairs:
        if old.instruction_ids != new.instruction_ids:
            raise ConfigError(
                f"prompts: key {old.key!r} has instructions {', '.join(old.instruction_ids)} "
                f"before, {', '.join(new.instruction_ids)} after; the runs are over different "
                "prompt files"
            )
    same = [_same_answer(pair) for pair in pairs]
    old_scores, new_scores = zip(*pairs, strict=True)
    return Comparison(
        before=replace(before, prompts=old_scores),
        after=replace(after, prompts=new_scores),
        metrics={name: _metric_change(name, old_scores, new_scores) for name in METRICS},
        flips=_flips(pairs),
        same_answers=same.count(True),
        unknown_answers=same.count(None),
        settings=changes,
        only_before=len(first) - len(common),
        only_after=len(second) - len(common),
    )


def setting_changes(before: RunSettings, after: RunSettings) -> tuple[SettingChange, ...]:
    """Return the recorded settings that differ, decisive ones at the front.

    Facts of a server that one run does not know are ignored, as is its address. The seed is
    decisive only if answers are sampled.
    """
    drawn = any((settings.temperature or 0) > 0 for settings in (before, after))
    changes = []
    for name, (one, other) in before.differences(after).items():
        asked = name.startswith("task_settings.") and name not in _ABOUT_PROMPTS
        decisive = asked or name in _DECISIVE or (name == "seed" and drawn)
        if name != "base_url":
            changes.append(SettingChange(name, one, other, decisive, name in _BATCHING))
    return tuple(sorted(changes, key=lambda change: not change.decisive))


def _check_settings(
    changes: Sequence[SettingChange], allow: Collection[str], known: Collection[str]
) -> None:
    """Raise ConfigError for an unknown name in `allow`, or a decisive setting not in it."""
    for name in allow:
        if name not in known:
            raise ConfigError(f"--allow: got {name!r}; allowed are {', '.join(sorted(known))}")
    for change in changes:
        field = PROMPTS if change.name == _PROMPT_FILE else change.name
        if change.decisive and field not in allow:
            raise ConfigError(
                f"{change.name}: {change.before!r} before, {change.after!r} after; the runs were "
                f"not asked or scored alike; do one again, or --allow {field}"
            )


def _check_keys(before: int, after: int, common: int, allowed: bool) -> None:
    if not common:
        raise ConfigError(
            f"prompts: {before} before, {after} after, no key in both; compare runs on the same "
            "prompts"
        )
    if not allowed and not before == after == common:
        raise ConfigError(
            f"prompts: {before} before, {after} after, {common} in both; run the missing ones, or "
            f"--allow {PROMPTS} to compare what both have"
        )


def _same_answer(pair: _Pair) -> bool | None:
    """Return True if both answers have the same text, or None if a hash is missing."""
    old, new = (score.answer_sha256 for score in pair)
    return None if None in (old, new) else old == new


def _metric_change(
    name: str, before: Sequence[PromptScore], after: Sequence[PromptScore]
) -> MetricChange:
    by_prompt, loose = name in (PROMPT_STRICT, PROMPT_LOOSE), "loose" in name
    worse = better = 0
    for pair in zip(before, after, strict=True):
        first, second = (s.follow_loose if loose else s.follow_strict for s in pair)
        rows = [(all(first), all(second))] if by_prompt else zip(first, second, strict=True)
        for x, y in rows:
            worse += x > y
            better += x < y
    sides = metric(before, name), metric(after, name)
    if by_prompt:
        difference = paired_difference(worse, better, len(before))
        return MetricChange(*sides, difference, worse, better, mcnemar(worse, better))
    (old, sizes), (new, _) = columns(before, name), columns(after, name)
    return MetricChange(*sides, bootstrap_difference(old, new, sizes), worse, better, None)


def _flips(pairs: Sequence[_Pair]) -> tuple[Flip, ...]:
    found = []
    for old, new in pairs:
        rows = zip(old.instruction_ids, old.follow_strict, new.follow_strict, strict=True)
        changed = tuple(name for name, x, y in rows if x != y)
        if all(old.follow_strict) != all(new.follow_strict):
            better = all(new.follow_strict)
            found.append(Flip(old.key, better, changed, _same_answer((old, new))))
    return tuple(found)
