"""What the parts of the room hand to each other: questions, answers, settings, scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PROMPT_STRICT = "Prompt-level-strict-accuracy"
INST_STRICT = "Inst-level-strict-accuracy"
PROMPT_LOOSE = "Prompt-level-loose-accuracy"
INST_LOOSE = "Inst-level-loose-accuracy"
METRICS = (PROMPT_STRICT, INST_STRICT, PROMPT_LOOSE, INST_LOOSE)
"""Names of IFEval's four metrics, as OpenCompass prints them; the first is the primary one."""

ANSWERS_FILE = "answers.jsonl"
SCORES_FILE = "scores.json"
REPORT_FILE = "report.md"


@dataclass(frozen=True)
class Question:
    """One request of a run.

    Attributes:
        key: unique in the run; answers are found again by it.
        messages: of the chat, each with `role` and `content`.
        max_tokens: longest answer, tokens.
        metadata: what the task needs to score the answer; kept beside it, never sent.
    """

    key: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a server answered to one question, or why it did not.

    Attributes:
        key: of the question.
        text: the message's content; empty with an error.
        finish_reason: `stop`, `length`, ...; None with an error.
        prompt_tokens: as the server counts them; None where it does not say.
        completion_tokens: the same for the answer.
        seconds: from the last attempt's request to its whole answer.
        error: one line, None when the question was answered.
    """

    key: str
    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    error: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        """The answer of a JSON object that has its fields, and possibly others.

        Raises:
            KeyError: a field is missing.
            TypeError: key or text is no text.
        """
        if not (isinstance(data["key"], str) and isinstance(data["text"], str)):
            raise TypeError(f"key {data['key']!r} and text have to be texts")
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class RunSettings:
    """What decides the answers of a run; what is unknown is None.

    Attributes:
        task: `ifeval`, `retrieval`, ...
        base_url: of the server, with `/v1`.
        model: the name that requests carry.
        temperature: 0 is greedy.
        max_tokens: longest answer, tokens.
        seed: of every request, although greedy decoding draws nothing.
        concurrency: requests in flight; greedy tokens may depend on the batch.
        thinking: True and False are asked of the chat template; None leaves it its default.
        server: what the server says of itself: version, commit, device, types, limits.
        task_settings: what else the task was run with: prompt file, lengths, ...
    """

    task: str
    base_url: str
    model: str
    temperature: float
    max_tokens: int
    seed: int
    concurrency: int
    thinking: bool | None = None
    server: dict[str, Any] = field(default_factory=dict)
    task_settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunSettings:
        """The settings of a JSON object that `to_json` made."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


@dataclass(frozen=True)
class PromptScore:
    """How one answer followed its instructions.

    Attributes:
        key: of the prompt.
        instruction_ids: such as `punctuation:no_comma`, in the prompt's order.
        follow_strict: for each instruction, the answer as it is.
        follow_loose: for each instruction, the best variant of the answer.
        finish_reason: of the answer; None where unknown.
        prompt_tokens: None where unknown.
        completion_tokens: None where unknown.
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

    @property
    def strict(self) -> bool:
        """True if all instructions hold for the answer as it is."""
        return all(self.follow_strict)

    @property
    def loose(self) -> bool:
        """True if all instructions hold, each for its best variant of the answer."""
        return all(self.follow_loose)

    def to_json(self) -> dict[str, Any]:
        """The score as a JSON object of `scores.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PromptScore:
        """The score of a JSON object that `to_json` made and a file may have kept."""
        lists = ("instruction_ids", "follow_strict", "follow_loose")
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**{**known, **{name: tuple(data[name]) for name in lists}})
