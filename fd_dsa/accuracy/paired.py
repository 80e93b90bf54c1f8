"""Two scored runs on the same prompts, paired by key: what differs, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fd_dsa.accuracy.scores import Metric, Scores, columns, metrics
from fd_dsa.accuracy.stats import Estimate, bootstrap_difference, mcnemar, paired_difference
from fd_dsa.accuracy.types import (
    METRICS,
    PROMPT_LOOSE,
    PROMPT_STRICT,
    PromptScore,
    RunSettings,
)
from fd_dsa.errors import ConfigError

PROMPTS = "prompts"
"""What `allow` names to compare runs over different prompts on those that both have."""

# another value asks another question, so the runs do not belong together
_DECISIVE = ("task", "max_tokens", "temperature", "thinking")
# how many and under which name: the keys themselves are compared
_ABOUT_PROMPTS = tuple(f"task_settings.{n}" for n in ("prompts", "num_prompts", "prompts_in_file"))
_PROMPT_FILE = "task_settings.prompts_sha256"
# another value changes the batches, and greedy tokens may change with them
_BATCHING = (
    "concurrency",
    "server.max_num_seqs",
    "server.max_num_batched_tokens",
    "server.target_inter_token_latency_ms",
    "server.enable_prefix_caching",
)


@dataclass(frozen=True)
class SettingChange:
    """A recorded setting that differs.

    Attributes:
        name: `max_tokens`, `server.kv_cache_dtype`, ...
        before: its value.
        after: its value.
        decisive: the runs do not belong together, unless allowed by name.
        batching: changes which requests share a step.
    """

    name: str
    before: Any
    after: Any
    decisive: bool
    batching: bool

    @property
    def allowed_by(self) -> str:
        """What `allow` has to name."""
        return PROMPTS if self.name == _PROMPT_FILE else self.name


@dataclass(frozen=True)
class MetricChange:
    """One metric in both runs.

    Attributes:
        before: of the first run.
        after: of the second.
        difference: after - before, by bootstrap over prompts.
        paired: the same from the flips alone, which holds with few of them; None on the
            instruction level.
        worse: prompts (prompt level) or instructions that passed before only.
        better: those that passed after only.
        p: exact McNemar; None on the instruction level, where trials are not independent.
    """

    before: Metric
    after: Metric
    difference: Estimate
    paired: Estimate | None
    worse: int
    better: int
    p: float | None


@dataclass(frozen=True)
class TypeChange:
    """Instructions of one type, strict: all, followed before, after, before only, after only."""

    total: int
    before: int
    after: int
    worse: int
    better: int


@dataclass(frozen=True)
class Flip:
    """A prompt whose result changed.

    Attributes:
        key: of the prompt.
        better: True if it fails before and passes after.
        instructions: those of its instructions that changed.
        same_answer: True if both runs gave the same text, so that only the scorer differs; None
            where a hash is missing.
    """

    key: str
    better: bool
    instructions: tuple[str, ...]
    same_answer: bool | None


@dataclass(frozen=True)
class Comparison:
    """All that two paired runs say.

    Attributes:
        before: the first run, on the common prompts.
        after: the second, on the same prompts in the same order.
        metrics: name -> change; the first is the primary one.
        types: instruction type -> change, by name.
        strict: prompts that flipped on the strict prompt level, in the order of the first run.
        loose: the same on the loose one.
        same_answers: prompts whose answers have the same SHA-256.
        unknown_answers: prompts with a hash missing in a run.
        settings: what differs in the recorded settings; addresses left out.
        only_before: prompts that only the first run has, left out.
        only_after: prompts that only the second run has, left out.
    """

    before: Scores
    after: Scores
    metrics: dict[str, MetricChange]
    types: dict[str, TypeChange]
    strict: tuple[Flip, ...]
    loose: tuple[Flip, ...]
    same_answers: int
    unknown_answers: int
    settings: tuple[SettingChange, ...]
    only_before: int
    only_after: int

    @property
    def prompts(self) -> int:
        """Number of common prompts."""
        return len(self.before.prompts)

    @property
    def primary(self) -> MetricChange:
        """The change of the primary metric, named before any run."""
        return self.metrics[PROMPT_STRICT]


def compare(before: Scores, after: Scores, allow: Collection[str] = ()) -> Comparison:
    """Pair two runs by key and count what changed.

    Args:
        before: the first run.
        after: the second.
        allow: decisive settings that may differ, or `prompts`: see `PROMPTS`.

    Raises:
        ConfigError: `allow` names what is no setting, a decisive setting differs, the runs are
            over different prompts, or none is in both; one line with the field and both values.
    """
    changes = setting_changes(before.settings, after.settings)
    _check_allowed(allow, {PROMPTS, *_flat(before.settings), *_flat(after.settings)})
    for change in changes:
        if change.decisive and change.allowed_by not in allow:
            raise ConfigError(
                f"{change.name}: {change.before!r} before, {change.after!r} after; the runs were "
                f"not asked or scored alike; do one again, or --allow {change.allowed_by}"
            )
    first, second = before.by_key, after.by_key
    common = [key for key in first if key in second]
    missing = (len(first) - len(common), len(second) - len(common))
    _check_keys(len(first), len(second), len(common), PROMPTS in allow)
    pairs = [(first[key], second[key]) for key in common]
    for old, new in pairs:
        _check_instructions(old, new)
    same = [_same_answer(old, new) for old, new in pairs]
    old_scores, new_scores = zip(*pairs, strict=True)
    return Comparison(
        before=replace(before, prompts=old_scores),
        after=replace(after, prompts=new_scores),
        metrics=_metric_changes(old_scores, new_scores),
        types=_type_changes(pairs),
        strict=_flips(pairs, lambda score: score.follow_strict),
        loose=_flips(pairs, lambda score: score.follow_loose),
        same_answers=same.count(True),
        unknown_answers=same.count(None),
        settings=changes,
        only_before=missing[0],
        only_after=missing[1],
    )


def setting_changes(before: RunSettings, after: RunSettings) -> tuple[SettingChange, ...]:
    """Recorded settings that differ, decisive ones first.

    Facts of a server that one run does not know are no difference; neither is its address. The
    seed is decisive only where answers are drawn.
    """
    old, new = _flat(before), _flat(after)
    drawn = before.temperature > 0 or after.temperature > 0
    changes = []
    for name in dict.fromkeys([*old, *new]):
        one, other = old.get(name), new.get(name)
        unknown = name.startswith("server.") and None in (one, other)
        if one == other or unknown or name == "base_url":
            continue
        asked = name in _DECISIVE or (
            name.startswith("task_settings.") and name not in _ABOUT_PROMPTS
        )
        decisive = asked or (name == "seed" and drawn)
        changes.append(SettingChange(name, one, other, decisive, name in _BATCHING))
    return tuple(sorted(changes, key=lambda change: not change.decisive))


def _flat(settings: RunSettings) -> dict[str, Any]:
    """Settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in settings.to_json().items():
        inner: Mapping[str, Any] | None = value if isinstance(value, dict) else None
        found.update(
            {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
        )
    return found


def _check_allowed(allow: Collection[str], known: Collection[str]) -> None:
    """Raise where `allow` names nothing."""
    for name in allow:
        if name not in known:
            raise ConfigError(f"--allow: got {name!r}; allowed are {', '.join(sorted(known))}")


def _check_keys(before: int, after: int, common: int, allowed: bool) -> None:
    """Raise where the runs are over different prompts."""
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


def _check_instructions(old: PromptScore, new: PromptScore) -> None:
    """Raise where one key names two prompts."""
    if old.instruction_ids != new.instruction_ids:
        raise ConfigError(
            f"prompts: key {old.key!r} has instructions {', '.join(old.instruction_ids)} before, "
            f"{', '.join(new.instruction_ids)} after; the runs are over different prompt files"
        )


def _same_answer(old: PromptScore, new: PromptScore) -> bool | None:
    """Whether both answers are the same text; None where a hash is missing."""
    if old.answer_sha256 is None or new.answer_sha256 is None:
        return None
    return old.answer_sha256 == new.answer_sha256


def _metric_changes(
    before: Sequence[PromptScore], after: Sequence[PromptScore]
) -> dict[str, MetricChange]:
    """Name -> change, the primary metric first."""
    old, new = metrics(before), metrics(after)
    found = {}
    for name in METRICS:
        first, sizes = columns(before, name)
        second, _ = columns(after, name)
        by_prompt = name in (PROMPT_STRICT, PROMPT_LOOSE)
        worse, better = _instruction_flips(before, after, name)
        if by_prompt:
            worse = sum(x > y for x, y in zip(first, second, strict=True))
            better = sum(x < y for x, y in zip(first, second, strict=True))
        found[name] = MetricChange(
            before=old[name],
            after=new[name],
            difference=bootstrap_difference(first, second, sizes),
            paired=paired_difference(worse, better, len(before)) if by_prompt else None,
            worse=worse,
            better=better,
            p=mcnemar(worse, better) if by_prompt else None,
        )
    return found


def _instruction_flips(
    before: Sequence[PromptScore], after: Sequence[PromptScore], metric: str
) -> tuple[int, int]:
    """Instructions that passed before only, and after only."""
    loose = "loose" in metric
    worse = better = 0
    for old, new in zip(before, after, strict=True):
        first, second = (s.follow_loose if loose else s.follow_strict for s in (old, new))
        worse += sum(x > y for x, y in zip(first, second, strict=True))
        better += sum(x < y for x, y in zip(first, second, strict=True))
    return worse, better


def _type_changes(pairs: Sequence[tuple[PromptScore, PromptScore]]) -> dict[str, TypeChange]:
    """Instruction type -> its strict counts."""
    counts: dict[str, list[int]] = {}
    for old, new in pairs:
        rows = zip(old.instruction_ids, old.follow_strict, new.follow_strict, strict=True)
        for name, first, second in rows:
            row = counts.setdefault(name, [0] * 5)
            for place, value in enumerate((1, first, second, first > second, first < second)):
                row[place] += value
    return {name: TypeChange(*counts[name]) for name in sorted(counts)}


def _flips(
    pairs: Sequence[tuple[PromptScore, PromptScore]],
    followed: Callable[[PromptScore], tuple[bool, ...]],
) -> tuple[Flip, ...]:
    """Prompts whose result changed."""
    found = []
    for old, new in pairs:
        first, second = followed(old), followed(new)
        if all(first) == all(second):
            continue
        rows = zip(old.instruction_ids, first, second, strict=True)
        changed = tuple(name for name, x, y in rows if x != y)
        found.append(Flip(old.key, all(second), changed, _same_answer(old, new)))
    return tuple(found)
