"""Settings and scores of runs, `scores.json`, and IFEval's metrics and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import compress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fd_dsa.accuracy.stats import Estimate, bootstrap_share, wilson
from fd_dsa.client.questions import Answer
from fd_dsa.command_line.report import Table, as_json, page, write_files
from fd_dsa.commands import own_command
from fd_dsa.errors import ConfigError

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
END_OF_THOUGHT = "</think>"
"""The part of an answer up to this mark is stored and not scored."""
MAX_CUT_SHARE = 0.02
"""A report warns above this share of answers cut at max_tokens."""
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
        task_settings: further settings of the task: prompt file, lengths, ...
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunSettings:
        """Read the settings from a JSON object with these fields.

        Raises:
            TypeError: a field is missing.
        """
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


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
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    answer_sha256: str | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.follow_strict), len(self.follow_loose)}
        if not self.instruction_ids or lengths != {len(self.instruction_ids)}:
            raise ValueError("each instruction is followed or not, and there is one at least")


def without_reasoning(text: str) -> str:
    """Return the part of an answer after the model's reasoning."""
    _, mark, rest = text.rpartition(END_OF_THOUGHT)
    return rest.lstrip() if mark else text


def prompt_score(
    answer: Answer, names: tuple[str, ...], strict: tuple[bool, ...], loose: tuple[bool, ...]
) -> PromptScore:
    """Return the score of an answer from its strict and loose results."""
    counts = answer.prompt_tokens, answer.completion_tokens
    # a server may split a character, which leaves a lone surrogate
    sha = sha256(answer.text.encode("utf-8", "surrogatepass")).hexdigest()
    return PromptScore(answer.key, names, strict, loose, answer.finish_reason, *counts, sha)


def shown(value: object) -> str:
    """Return a value for a message, shortened if long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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

    def to_json(self) -> str:
        """Return the text of `scores.json`."""
        return as_json(
            {
                "settings": asdict(self.settings),
                "prompts": [asdict(score) for score in self.prompts],
                "metrics": {name: m.to_json() for name, m in metrics(self.prompts).items()},
            }
        )


def columns(prompts: Sequence[PromptScore], metric: str) -> tuple[list[int], list[int]]:
    """Return passed number and size of each prompt, in the units of a metric."""
    loose = metric in (PROMPT_LOOSE, INST_LOOSE)
    follows = [score.follow_loose if loose else score.follow_strict for score in prompts]
    if metric in (INST_STRICT, INST_LOOSE):
        return [sum(follow) for follow in follows], [len(follow) for follow in follows]
    return [int(all(follow)) for follow in follows], [1] * len(follows)


def metric(prompts: Sequence[PromptScore], name: str) -> Metric:
    """Return a metric: Wilson's interval for prompts, a bootstrap for instructions."""
    passed, sizes = columns(prompts, name)
    by_prompt, total = name in (PROMPT_STRICT, PROMPT_LOOSE), sum(sizes)
    share = wilson(sum(passed), total) if by_prompt else bootstrap_share(passed, sizes)
    return Metric(sum(passed), total, share)


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


def settings_table(settings: RunSettings) -> Table:
    """Return a table of the settings that determine answers (not the server's address)."""
    rows = settings.flat()
    del rows["base_url"]
    if settings.thinking is None:
        rows["thinking"] = "default of the chat template"
    texts = {name: "unknown" if value is None else str(value) for name, value in rows.items()}
    return Table("Settings", ("setting", "value"), tuple(texts.items()))


def read_scores(path: Path) -> Scores:
    """Read the scores of a run."""
    file = path / SCORES_FILE if path.is_dir() else path
    try:
        scores = TypeAdapter(Scores).validate_json(file.read_bytes(), strict=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"{file}: {reason}; give the folder of a scored run or its {SCORES_FILE}"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise ConfigError(
            f"{file}: {place}got {shown(first['input'])}: {first['msg']}; give a "
            f"{SCORES_FILE} that `{own_command('accuracy', 'score')}` made"
        ) from error
    if not scores.prompts:
        raise ConfigError(f"{file}: prompts: got none; score the run again")
    key, count = Counter(score.key for score in scores.prompts).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{file}: key {key!r} is there twice; each may be there once")
    return scores


def write_report(out: Path, scores: Scores, notes: Sequence[str] = ()) -> list[Path]:
    """Write `scores.json` and `report.md` together, and return their paths."""
    shown = [*parts(scores, notes), settings_table(scores.settings)]
    files = {
        SCORES_FILE: scores.to_json(),
        REPORT_FILE: page(f"IFEval: {scores.settings.model}", shown),
    }
    write_files(out, files)
    return [out / name for name in files]


def cut_warning(scores: Scores, which: str = "") -> str | None:
    """Return a warning if more than `MAX_CUT_SHARE` of the answers ended at max_tokens."""
    cut = sum(score.finish_reason == "length" for score in scores.prompts)
    if cut <= MAX_CUT_SHARE * len(scores.prompts):
        return None
    return (
        f"Warning: {cut} of {len(scores.prompts)} answers{which} were cut at max_tokens "
        f"{scores.settings.max_tokens} (finish_reason length); a cut answer often fails."
    )


def parts(scores: Scores, notes: Sequence[str]) -> list[str | Table]:
    """Return tables and notes, in order."""
    rows = [
        (name, f"{metric.passed}/{metric.total}", metric.share.percent())
        for name, metric in metrics(scores.prompts).items()
    ]
    types = [
        (name, str(total), *(wilson(passed, total).percent() for passed in followed))
        for name, (total, *followed) in by_type(scores.prompts).items()
    ]
    title = f"IFEval, {len(scores.prompts)} prompts"
    warning = cut_warning(scores)
    return [
        Table(title, ("metric", "passed", "% [95 % interval]"), tuple(rows), (_HOW,)),
        *notes,
        *([warning] if warning else []),
        Table("By type of instruction", ("type", "number", "strict, %", "loose, %"), tuple(types)),
    ]
