"""Settings and scores of runs, `scores.json`, and IFEval's metrics and report."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import compress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fd_dsa.accuracy.stats import Estimate, bootstrap_share, wilson
from fd_dsa.chat.parser import THINK_END
from fd_dsa.client.questions import Answer, Question
from fd_dsa.command_line.inputs import MAX_BYTES, read_bounded
from fd_dsa.command_line.report import Table, as_json, page, publish
from fd_dsa.commands import own_command
from fd_dsa.errors import ConfigError, shorten, shorten_text, system_reason

PROMPT_STRICT = "Prompt-level-strict-accuracy"
INST_STRICT = "Inst-level-strict-accuracy"
PROMPT_LOOSE = "Prompt-level-loose-accuracy"
INST_LOOSE = "Inst-level-loose-accuracy"
METRICS = (PROMPT_STRICT, INST_STRICT, PROMPT_LOOSE, INST_LOOSE)
"""Names of IFEval's four metrics, as printed by OpenCompass.

The first is the primary one.
"""

ANSWERS_FILE = "answers.jsonl"
SCORES_FILE = "scores.json"
REPORT_FILE = "report.md"
MAX_CUT_SHARE = 0.02
"""A report warns above this share of answers cut at max_tokens."""
# settings that change the question; runs that differ here are not comparable
_DECISIVE = ("task", "max_tokens", "temperature", "thinking")
_HOW = (
    "Intervals are of 95 %: Wilson's for prompts and types, a bootstrap over prompts for the "
    "instruction-level metrics, since instructions of one prompt pass or fail together."
)


@dataclass(frozen=True)
class RunSettings:
    """The settings that determine the answers of a run. None = unknown.

    Attributes:
        concurrency: number of requests in flight. Greedy tokens may depend on the batch.
        thinking: value for the chat template. None = the template's default.
        server: the server's description of itself: version, commit, device, types, limits.
        task_settings: further settings of the task: hash of the prompts, lengths, ...
    """

    task: str
    base_url: str | None
    model: str | None
    temperature: float | None
    max_tokens: int | None
    seed: int | None
    concurrency: int | None
    thinking: bool | None = None
    server: dict[str, Any] = field(default_factory=dict)
    task_settings: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Return the settings by dotted name, such as `server.dtype`."""
        known = asdict(self)
        inner = {name: known.pop(name) for name in ("server", "task_settings")}
        return known | {f"{n}.{k}": v for n, value in inner.items() for k, v in value.items()}

    def differences(self, other: RunSettings) -> dict[str, tuple[Any, Any]]:
        """Return name -> both values for different settings.

        Unknown facts of a server are equal.
        """
        one, two = self.flat(), other.flat()
        pairs = {name: (one.get(name), two.get(name)) for name in {**one, **two}}
        return {
            name: (old, new)
            for name, (old, new) in pairs.items()
            if old != new and not (name.startswith("server.") and None in (old, new))
        }


@dataclass(frozen=True)
class SettingChange:
    """A recorded setting that differs, such as `max_tokens` or `server.kv_cache_dtype`.

    Attributes:
        decisive: True if the runs are not comparable, unless the setting is allowed by name.
    """

    name: str
    before: Any
    after: Any
    decisive: bool


def setting_changes(before: RunSettings, after: RunSettings) -> tuple[SettingChange, ...]:
    """Return the recorded settings that differ, decisive ones at the front.

    Facts of a server that one run does not know are ignored, as is its address. The seed is
    decisive only if answers are sampled.
    """
    drawn = any((settings.temperature or 0) > 0 for settings in (before, after))
    changes = []
    for name, (one, other) in before.differences(after).items():
        asked = name.startswith("task_settings.") or name in _DECISIVE
        decisive = asked or (name == "seed" and drawn)
        if name != "base_url":
            changes.append(SettingChange(name, one, other, decisive))
    return tuple(sorted(changes, key=lambda change: not change.decisive))


def prompts_sha256(prompts: Iterable[Question | Answer]) -> str:
    """Return a hash of prompts in any order."""
    messages = sorted((prompt.key, prompt.messages) for prompt in prompts)
    return sha256(json.dumps(messages).encode()).hexdigest()


@dataclass(frozen=True)
class PromptScore:
    """The result of each instruction for one answer.

    Attributes:
        follow_loose: for each instruction, the result of the answer's best variant.
        answer_sha256: hash of the scored text in UTF-8, hexadecimal.
    """

    key: str
    instruction_ids: tuple[str, ...]
    follow_strict: tuple[bool, ...]
    follow_loose: tuple[bool, ...]
    answer_sha256: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def passed(self) -> bool:
        """True if every instruction is followed strictly."""
        return all(self.follow_strict)

    def __post_init__(self) -> None:
        lengths = {len(self.follow_strict), len(self.follow_loose)}
        if not self.instruction_ids or lengths != {len(self.instruction_ids)}:
            raise ValueError("each instruction is followed or not, and there is one at least")


def without_reasoning(text: str) -> str:
    """Return the part of an answer after the model's reasoning, which is not scored."""
    _, mark, rest = text.rpartition(THINK_END)
    return rest.lstrip() if mark else text


def prompt_score(
    answer: Answer, names: tuple[str, ...], strict: tuple[bool, ...], loose: tuple[bool, ...]
) -> PromptScore:
    """Return the score of an answer from its strict and loose results."""
    counts = answer.prompt_tokens, answer.completion_tokens
    sha = sha256(answer.text.encode()).hexdigest()
    return PromptScore(answer.key, names, strict, loose, sha, answer.finish_reason, *counts)


@dataclass(frozen=True)
class Metric:
    """Number and share of passed prompts or instructions, with an interval."""

    passed: int
    total: int
    share: Estimate

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "total": self.total, **self.share.to_json()}


@dataclass(frozen=True)
class Scores:
    """A scored run."""

    settings: RunSettings
    prompts: tuple[PromptScore, ...]

    @property
    def by_key(self) -> dict[str, PromptScore]:
        return {score.key: score for score in self.prompts}

    def to_json(self, **figures: object) -> str:
        """Return the text of `scores.json`, with further figures of the task."""
        prompts = [asdict(score) for score in self.prompts]
        return as_json({"settings": asdict(self.settings), "prompts": prompts, **figures})


def units(score: PromptScore, name: str) -> tuple[bool, ...]:
    """Return what a metric counts of a prompt: whether it passed, or each instruction's result."""
    follow = score.follow_loose if name in (PROMPT_LOOSE, INST_LOOSE) else score.follow_strict
    return (all(follow),) if name in (PROMPT_STRICT, PROMPT_LOOSE) else follow


def metric(prompts: Sequence[PromptScore], name: str) -> Metric:
    """Return a metric: Wilson's interval for prompts, a bootstrap for instructions."""
    found = [units(score, name) for score in prompts]
    passed, sizes = list(map(sum, found)), list(map(len, found))
    by_prompt = name in (PROMPT_STRICT, PROMPT_LOOSE)
    share = wilson(sum(passed), sum(sizes)) if by_prompt else bootstrap_share(passed, sizes)
    return Metric(sum(passed), sum(sizes), share)


def metrics(prompts: Sequence[PromptScore]) -> dict[str, Metric]:
    """Return the four metrics, beginning with the primary one."""
    return {name: metric(prompts, name) for name in METRICS}


def by_type(prompts: Sequence[PromptScore]) -> dict[str, tuple[int, int, int]]:
    """Return instruction type -> (number, followed strictly, followed loosely), by name."""
    totals, strict, loose = Counter[str](), Counter[str](), Counter[str]()
    for score in prompts:
        totals.update(score.instruction_ids)
        strict.update(compress(score.instruction_ids, score.follow_strict))
        loose.update(compress(score.instruction_ids, score.follow_loose))
    return {name: (total, strict[name], loose[name]) for name, total in sorted(totals.items())}


def _settings_table(settings: RunSettings) -> Table:
    """Return a table of the settings that determine answers (not the server's address)."""
    rows = settings.flat()
    del rows["base_url"]
    if settings.thinking is None:
        rows["thinking"] = "default of the chat template"
    texts = {name: "unknown" if value is None else str(value) for name, value in rows.items()}
    return Table("Settings", ("setting", "value"), tuple(texts.items()))


def first_fault(error: ValidationError) -> str:
    """Return field, value and rule of the first error in a file."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"{part}: " for part in first["loc"])
    return f"{place}got {shorten(first['input'])}: {first['msg']}"


def read_scores(path: Path) -> Scores:
    """Read the scores of a run."""
    file = path / SCORES_FILE if os.path.isdir(path) else path
    try:
        data = read_bounded(file, MAX_BYTES, f"give a {SCORES_FILE}")
        scores = TypeAdapter(Scores).validate_json(data, strict=True)
    except OSError as error:
        reason = system_reason(error)
        raise ConfigError(
            f"{shorten_text(str(file))}: {reason}; give the folder of a scored run or its "
            f"{SCORES_FILE}"
        ) from error
    except ValidationError as error:
        command = own_command("accuracy", "score")
        raise ConfigError(
            f"{file}: {first_fault(error)}; give a {SCORES_FILE} that `{command}` made"
        ) from error
    if not scores.prompts:
        raise ConfigError(f"{file}: prompts: got none; score the run again")
    key, count = Counter(score.key for score in scores.prompts).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{file}: key {key!r} is there twice; each may be there once")
    return scores


def write_report(
    out: Path, title: str, scores: Scores, parts: Sequence[str | Table], **figures: object
) -> None:
    """Print a report, and write it with the scores and figures to a folder."""
    settings = scores.settings
    text = page(f"{title}: {settings.model}", [*parts, _settings_table(settings)])
    publish(parts, out, {SCORES_FILE: scores.to_json(**figures), REPORT_FILE: text})


def cut_warning(scores: Scores, which: str = "") -> list[str]:
    """Return a warning if more than `MAX_CUT_SHARE` of the answers ended at max_tokens."""
    cut = sum(score.finish_reason == "length" for score in scores.prompts)
    if cut <= MAX_CUT_SHARE * len(scores.prompts):
        return []
    return [
        f"Warning: {cut} of {len(scores.prompts)} answers{which} were cut at max_tokens "
        f"{scores.settings.max_tokens} (finish_reason length); a cut answer often fails."
    ]


def parts(scores: Scores, notes: Sequence[str]) -> list[str | Table]:
    """Return IFEval's tables and notes, in order."""
    rows = [
        (name, f"{metric.passed}/{metric.total}", metric.share.percent())
        for name, metric in metrics(scores.prompts).items()
    ]
    types = [
        (name, str(total), *(wilson(passed, total).percent() for passed in followed))
        for name, (total, *followed) in by_type(scores.prompts).items()
    ]
    title = f"IFEval, {len(scores.prompts)} prompts"
    return [
        Table(title, ("metric", "passed", "% [95 % interval]"), tuple(rows), (_HOW,)),
        *notes,
        *cut_warning(scores),
        Table("By type of instruction", ("type", "number", "strict, %", "loose, %"), tuple(types)),
    ]
