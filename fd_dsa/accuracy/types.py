"""What the parts of the room hand to each other: questions, answers, settings, scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from fd_dsa.client.questions import Answer

PROMPT_STRICT = "Prompt-level-strict-accuracy"
INST_STRICT = "Inst-level-strict-accuracy"
PROMPT_LOOSE = "Prompt-level-loose-accuracy"
INST_LOOSE = "Inst-level-loose-accuracy"
METRICS = (PROMPT_STRICT, INST_STRICT, PROMPT_LOOSE, INST_LOOSE)
"""Names of IFEval's four metrics, as OpenCompass prints them; the first is the primary one."""

ANSWERS_FILE = "answers.jsonl"
SCORES_FILE = "scores.json"
REPORT_FILE = "report.md"
END_OF_THOUGHT = "</think>"
"""What an answer holds up to here is kept and not scored."""


@dataclass(frozen=True)
class RunSettings:
    """What decides the answers of a run; what is unknown is None.

    Attributes:
        concurrency: requests in flight; greedy tokens may depend on the batch.
        thinking: True and False are asked of the chat template; None leaves it its default.
        server: what the server says of itself: version, commit, device, types, limits.
        task_settings: what else the task was run with: prompt file, lengths, ...
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
        """Settings by dotted name, such as `server.dtype`."""
        known = asdict(self)
        inner = {name: known.pop(name) for name in ("server", "task_settings")}
        return known | {f"{n}.{k}": v for n, value in inner.items() for k, v in value.items()}

    def differences(self, other: RunSettings) -> dict[str, tuple[Any, Any]]:
        """Name -> both values where they differ; what a server does not say is no difference."""
        one, two = self.flat(), other.flat()
        pairs = {name: (one.get(name), two.get(name)) for name in {**one, **two}}
        return {
            name: (old, new)
            for name, (old, new) in pairs.items()
            if old != new and not (name.startswith("server.") and None in (old, new))
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunSettings:
        """The settings of a JSON object with these fields; raises TypeError without one."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


@dataclass(frozen=True)
class PromptScore:
    """How one answer followed its instructions.

    Attributes:
        instruction_ids: such as `punctuation:no_comma`, in the prompt's order.
        follow_strict: for each instruction, the answer as it is.
        follow_loose: for each instruction, the best variant of the answer.
        answer_sha256: of the scored text in UTF-8, in hexadecimal.
    """

    key: str
    instruction_ids: tuple[str, ...]
    follow_strict: tuple[bool, ...]
    follow_loose: tuple[bool, ...]
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    answer_sha256: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PromptScore:
        """The score of a JSON object that a file has kept.

        Raises:
            TypeError, ValueError: it is none.
        """
        known: dict[str, Any] = {n: data[n] for n in cls.__dataclass_fields__ if n in data}
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        score = cls(**known | lists)
        follows = score.follow_strict, score.follow_loose
        if any(type(one) is not bool for follow in follows for one in follow):
            raise ValueError("follow_strict and follow_loose are lists of true and false")
        if not score.instruction_ids or {*map(len, follows)} != {len(score.instruction_ids)}:
            raise ValueError("each instruction is followed or not, and there is one at least")
        return score


def without_reasoning(text: str) -> str:
    """What an answer says after the model has thought aloud."""
    _, mark, rest = text.rpartition(END_OF_THOUGHT)
    return rest.lstrip() if mark else text


def prompt_score(
    answer: Answer, names: tuple[str, ...], strict: tuple[bool, ...], loose: tuple[bool, ...]
) -> PromptScore:
    """The score of an answer from what it follows, strictly and loosely."""
    counts = answer.prompt_tokens, answer.completion_tokens
    # a server may cut a character in two
    sha = sha256(answer.text.encode("utf-8", "surrogatepass")).hexdigest()
    return PromptScore(answer.key, names, strict, loose, answer.finish_reason, *counts, sha)


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
