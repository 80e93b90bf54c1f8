"""`scores.json`: what a run's answers were worth, prompt by prompt, and the metrics of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd_dsa.accuracy.report import as_json
from fd_dsa.accuracy.stats import Estimate, bootstrap_share, wilson
from fd_dsa.accuracy.types import (
    INST_LOOSE,
    INST_STRICT,
    METRICS,
    PROMPT_LOOSE,
    PROMPT_STRICT,
    SCORES_FILE,
    PromptScore,
    RunSettings,
)
from fd_dsa.errors import ConfigError

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Metric:
    """How many prompts or instructions passed, and the share with its interval."""

    passed: int
    total: int
    share: Estimate


@dataclass(frozen=True)
class TypeScore:
    """Instructions of one type: all, followed strictly, followed loosely."""

    total: int
    strict: int
    loose: int


@dataclass(frozen=True)
class Scores:
    """A scored run.

    Attributes:
        settings: of the run.
        prompts: in the order in which they were scored, each key once, at least one.
    """

    settings: RunSettings
    prompts: tuple[PromptScore, ...]

    @property
    def by_key(self) -> dict[str, PromptScore]:
        """Key -> score."""
        return {score.key: score for score in self.prompts}

    def to_json(self) -> str:
        """The text of `scores.json`."""
        return as_json(
            {
                "settings": self.settings.to_json(),
                "prompts": [score.to_json() for score in self.prompts],
                "metrics": {name: metric_json(m) for name, m in metrics(self.prompts).items()},
            }
        )


def columns(prompts: Sequence[PromptScore], metric: str) -> tuple[list[int], list[int]]:
    """Of each prompt, what passed and what there was, in the units of a metric.

    Args:
        metric: one of `METRICS`; a prompt counts as one in the prompt-level ones.
    """
    loose = metric in (PROMPT_LOOSE, INST_LOOSE)
    follows = [score.follow_loose if loose else score.follow_strict for score in prompts]
    if metric in (INST_STRICT, INST_LOOSE):
        return [sum(follow) for follow in follows], [len(follow) for follow in follows]
    return [int(all(follow)) for follow in follows], [1] * len(follows)


def metrics(prompts: Sequence[PromptScore]) -> dict[str, Metric]:
    """The four metrics, the primary one first.

    Intervals: Wilson's for prompts, the bootstrap over prompts for instructions, since those of
    one prompt are not independent.
    """
    found = {}
    for name in METRICS:
        passed, sizes = columns(prompts, name)
        by_prompt = name in (PROMPT_STRICT, PROMPT_LOOSE)
        total = sum(sizes)
        share = wilson(sum(passed), total) if by_prompt else bootstrap_share(passed, sizes)
        found[name] = Metric(sum(passed), total, share)
    return found


def by_type(prompts: Sequence[PromptScore]) -> dict[str, TypeScore]:
    """Instruction type -> its counts, by name."""
    counts: dict[str, list[int]] = {}
    for score in prompts:
        rows = zip(score.instruction_ids, score.follow_strict, score.follow_loose, strict=True)
        for name, strict, loose in rows:
            row = counts.setdefault(name, [0, 0, 0])
            for place, value in enumerate((1, strict, loose)):
                row[place] += value
    return {name: TypeScore(*counts[name]) for name in sorted(counts)}


def metric_json(metric: Metric) -> dict[str, Any]:
    """A metric as a JSON object, in percent."""
    return {"passed": metric.passed, "total": metric.total, **estimate_json(metric.share)}


def estimate_json(estimate: Estimate) -> dict[str, float | None]:
    """An estimate as a JSON object, in percent or points to four decimals; NaN is null."""
    parts = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {n: None if part != part else round(100 * part, 4) for n, part in parts.items()}


def read_scores(path: Path) -> Scores:
    """The scores of a run.

    Args:
        path: a `scores.json`, or the folder of a run that holds one.

    Raises:
        ConfigError: there is none, or it is damaged; one line with file, field, value and rule.
    """
    file = path / SCORES_FILE if path.is_dir() else path
    try:
        data = json.loads(file.read_text("utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"{file}: {reason}; give the folder of a scored run or its {SCORES_FILE}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file}: is no JSON ({error}); give a {SCORES_FILE}") from error
    prompts = data.get("prompts") if isinstance(data, dict) else None
    if not isinstance(prompts, list) or not prompts or not isinstance(data.get("settings"), dict):
        raise ConfigError(
            f"{file}: has no settings and prompts of a scored run; give a {SCORES_FILE} that "
            "`python -m fd_dsa.accuracy score` made"
        )
    scores = tuple(_prompt(entry, f"{file}: prompts[{i}]") for i, entry in enumerate(prompts))
    seen: set[str] = set()
    for score in scores:
        if score.key in seen:
            raise ConfigError(f"{file}: key {score.key!r} is there twice; each may be there once")
        seen.add(score.key)
    return Scores(_settings(data["settings"], file), scores)


def _settings(data: Mapping[str, Any], file: Path) -> RunSettings:
    """The settings of a run, all that have no default present."""
    try:
        return RunSettings.from_json(data)
    except TypeError as error:
        raise ConfigError(
            f"{file}: settings: {error}".replace("RunSettings.__init__() ", "")
        ) from (error)


def _prompt(entry: Any, where: str) -> PromptScore:
    """One entry of the list of prompts, each field checked."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: {_shown(entry)}; a JSON object is needed")
    missing = [name for name in PromptScore.__dataclass_fields__ if name not in entry]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing; score the run again")
    names = entry["instruction_ids"]
    checks = {
        "key": (isinstance(entry["key"], str), "a text"),
        "instruction_ids": (_is_list(names, str) and bool(names), "a list of at least one text"),
        "answer_sha256": (
            entry["answer_sha256"] is None or _is_sha256(entry["answer_sha256"]),
            "64 hexadecimal digits or null",
        ),
    }
    count = len(names) if isinstance(names, list) else 0
    for name in ("follow_strict", "follow_loose"):
        good = _is_list(entry[name], bool) and len(entry[name]) == count
        checks[name] = (good, f"a list of {count} of true and false, one for each instruction")
    for name, (good, wanted) in checks.items():
        if not good:
            raise ConfigError(f"{where}: {name}: {_shown(entry[name])}; {wanted} is needed")
    return PromptScore.from_json(entry)


def _is_list(value: Any, kind: type) -> bool:
    """Whether a value is a list of one kind."""
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _is_sha256(value: Any) -> bool:
    """Whether a value is a SHA-256 in small hexadecimal digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
