"""What the recordings of all modes say: who agrees, and what a deviation is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fd_dsa.accuracy.answers import Record
from fd_dsa.accuracy.matrix.agreement import Agreement, agreement
from fd_dsa.accuracy.matrix.modes import Mode
from fd_dsa.accuracy.matrix.running import Recording, missed
from fd_dsa.accuracy.matrix.workload import IFEVAL, Workload
from fd_dsa.accuracy.paired import MetricChange, compare
from fd_dsa.accuracy.retrieval.scoring import score_record
from fd_dsa.accuracy.scorer import score
from fd_dsa.accuracy.scores import Metric, Scores, metrics
from fd_dsa.accuracy.stats import (
    Estimate,
    bootstrap_difference,
    mcnemar,
    paired_difference,
    wilson,
)
from fd_dsa.accuracy.types import PROMPT_STRICT, Answer, PromptScore, RunSettings

REFERENCE, EXACT, DIFFERS, DEVIATION = "reference", "exact", "DIFFERS", "deviation"
MISSED, SKIPPED = "NOT REACHED", "skipped"
# neighbouring tokens are not independent: whole stretches are resampled
_STRETCH = 64


@dataclass(frozen=True)
class Passed:
    """Questions of one kind that passed, and beside them those of the mode to compare with.

    Attributes:
        passed: questions that passed.
        total: all of them.
        worse: passed in the other mode only; 0 without one.
        better: passed in this mode only.
        difference: of the shares, from the flips; NaN without another mode.
        p: exact McNemar; 1 without flips.
    """

    passed: int
    total: int
    worse: int
    better: int
    difference: Estimate
    p: float

    @property
    def share(self) -> Estimate:
        """Share that passed, with its interval."""
        return wilson(self.passed, self.total)


@dataclass(frozen=True)
class Perplexity:
    """Of one text, and how it changed.

    Attributes:
        value: exp of the mean negative log-likelihood of a token.
        ratio: to that of the mode to compare with, with its interval; NaN without one.
    """

    value: float
    ratio: Estimate


@dataclass(frozen=True)
class Judgement:
    """One line of the matrix.

    Attributes:
        mode: what was run.
        verdict: `REFERENCE`, `EXACT`, `DIFFERS`, `DEVIATION`, `MISSED` or `SKIPPED`.
        reason: why it was skipped, or what did not happen; "" otherwise.
        agreement: with the mode to compare with; None for the reference, or where one was skipped.
        ifeval: prompts whose instructions all hold, strictly; None where skipped.
        retrieval: questions answered right; None where skipped.
        perplexity: None where skipped, or where the mode changes nothing about one sequence.
        facts: of the recording; empty where skipped.
    """

    mode: Mode
    verdict: str
    reason: str = ""
    agreement: Agreement | None = None
    ifeval: Passed | None = None
    retrieval: Passed | None = None
    perplexity: Perplexity | None = None
    facts: Mapping[str, Any] | None = None

    @property
    def failed(self) -> bool:
        """True if the mode is not what it has to be."""
        return self.verdict in (DIFFERS, MISSED)

    def to_json(self) -> dict[str, Any]:
        """The line as JSON values; what is not known is None."""
        found: dict[str, Any] = {
            "mode": self.mode.name,
            "changed": self.mode.changed,
            "against": self.mode.against,
            "kind": self.mode.kind,
            "verdict": self.verdict,
            "reason": self.reason,
            "agreement": self.agreement and self.agreement.to_json(),
            "ifeval_prompt_strict": self.ifeval and asdict(self.ifeval),
            "retrieval": self.retrieval and asdict(self.retrieval),
            "perplexity": self.perplexity and asdict(self.perplexity),
            "facts": dict(self.facts or {}),
        }
        return {name: _finite(value) for name, value in found.items()}


def judge(
    modes: Sequence[Mode],
    workload: Workload,
    recordings: Mapping[str, Recording],
    skipped: Mapping[str, str],
) -> list[Judgement]:
    """A line for each mode, in their order.

    Args:
        modes: the reference first; every mode after that which it is compared with.
        workload: that was recorded.
        recordings: by name of the mode.
        skipped: name of a mode without a recording -> why.
    """
    scores = {name: _Scored.of(recording, workload) for name, recording in recordings.items()}
    lines = []
    for mode in modes:
        recording = recordings.get(mode.name)
        if recording is None:
            lines.append(Judgement(mode, SKIPPED, skipped[mode.name]))
            continue
        other = recordings.get(mode.against or "")
        compared = agreement(other.traces, recording.traces) if other else None
        before = scores.get(mode.against or "")
        verdict, reason = _verdict(mode, recording, compared)
        lines.append(
            Judgement(
                mode,
                verdict,
                reason,
                compared,
                scores[mode.name].ifeval_beside(before),
                scores[mode.name].retrieval_beside(before),
                _perplexity(recording, other),
                recording.facts,
            )
        )
    return lines


def _verdict(mode: Mode, recording: Recording, compared: Agreement | None) -> tuple[str, str]:
    """A word, and the reason where there is one."""
    absent = missed(mode, recording.facts)
    if absent:
        return MISSED, absent
    if mode.against is None:
        return REFERENCE, ""
    if not mode.exact:
        return DEVIATION, ""
    if compared is None:
        return SKIPPED, f"{mode.against} was skipped"
    return (DIFFERS, "") if compared.partings else (EXACT, "")


@dataclass(frozen=True)
class _Scored:
    """The scores of a mode's answers.

    Attributes:
        ifeval: in the order of the prompts.
        retrieval: key -> whether the answer is right.
    """

    ifeval: tuple[PromptScore, ...]
    retrieval: dict[str, bool]

    @classmethod
    def of(cls, recording: Recording, workload: Workload) -> _Scored:
        """Score what a mode answered."""
        answers = {key: _answer(key, trace) for key, trace in recording.traces.items()}
        prompts = [one for one in workload.prompts if f"{IFEVAL}/{one.key}" in answers]
        texts = [_renamed(answers[f"{IFEVAL}/{prompt.key}"], prompt.key) for prompt in prompts]
        right = {
            key: score_record(Record(answers[key], question.messages, question.metadata)).passed
            for key, question in workload.questions.items()
            if key in answers
        }
        return cls(tuple(score(prompts, texts)), right)

    def ifeval_beside(self, other: _Scored | None) -> Passed | None:
        """Prompt-level strict accuracy, paired with that of another mode."""
        if not self.ifeval:
            return None
        own: Metric = metrics(self.ifeval)[PROMPT_STRICT]
        if other is None:
            return Passed(own.passed, own.total, 0, 0, Estimate(*[math.nan] * 3), 1.0)
        keys = {one.key for one in self.ifeval}
        common = tuple(one for one in other.ifeval if one.key in keys)
        change: MetricChange = compare(_run(common), _run(self.ifeval)).primary
        return _paired(own.passed, own.total, change.worse, change.better)

    def retrieval_beside(self, other: _Scored | None) -> Passed | None:
        """Right answers, paired with those of another mode."""
        if not self.retrieval:
            return None
        now = list(self.retrieval.values())
        if other is None:
            return Passed(sum(now), len(now), 0, 0, Estimate(*[math.nan] * 3), 1.0)
        before = [other.retrieval[key] for key in self.retrieval]
        worse = sum(x > y for x, y in zip(before, now, strict=True))
        better = sum(x < y for x, y in zip(before, now, strict=True))
        return _paired(sum(now), len(now), worse, better)


def _paired(passed: int, total: int, worse: int, better: int) -> Passed:
    """What flipped, and what that says: few questions without a flip still leave much open."""
    difference = paired_difference(worse, better, total)
    return Passed(passed, total, worse, better, difference, mcnemar(worse, better))


def _answer(key: str, trace: Any) -> Answer:
    """A trace as the answer that a server would have given."""
    return Answer(key, trace.text, trace.finish_reason, None, len(trace.token_ids), 0.0)


def _renamed(answer: Answer, key: str) -> Answer:
    """The answer under another key."""
    return Answer(key, answer.text, answer.finish_reason, None, answer.completion_tokens, 0.0)


def _run(prompts: tuple[PromptScore, ...]) -> Scores:
    """Scores as those of a run whose settings are the same in every mode."""
    return Scores(RunSettings(IFEVAL, "", "", 0.0, 0, 0, 0), prompts)


def _perplexity(recording: Recording, other: Recording | None) -> Perplexity | None:
    """That of a recording which has one, and its change."""
    now = recording.losses
    if now is None:
        return None
    ratio = Estimate(*[math.nan] * 3)
    if other is not None and other.losses is not None:
        starts = np.arange(0, len(now), _STRETCH)
        before, after = (np.add.reduceat(losses, starts) for losses in (other.losses, now))
        sizes = np.diff([*starts, len(now)])
        ratio = Estimate(*np.exp(bootstrap_difference(before, after, sizes)).tolist())
    return Perplexity(float(np.exp(now.mean())), ratio)


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: None in their place."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
