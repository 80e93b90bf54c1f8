"""Which prompts a run has: tasks x lengths x depths x trials, all drawn from one seed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from fd_dsa.accuracy.retrieval.prompts import PromptBuilder
from fd_dsa.accuracy.retrieval.tasks import TASKS, Item, TaskSizes
from fd_dsa.accuracy.retrieval.wordings import Wording
from fd_dsa.accuracy.types import Question
from fd_dsa.errors import ConfigError

DEFAULT_TASKS = ("passkey", "multikey", "variables")
DEFAULT_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CONTINUITY_TASKS = tuple(TASKS)
CONTINUITY_DEPTHS = (0.0, 0.5, 1.0)
_LENGTH = re.compile(r"(?:(?:(\d+)\*)?(topk|max))?([+-]?\d+)?")


@dataclass(frozen=True)
class Limits:
    """What a model allows, tokens; None where it is unknown.

    Attributes:
        index_topk: keys that a token attends to; up to here attention is dense.
        max_model_len: of prompt and answer together.
    """

    index_topk: int | None
    max_model_len: int | None


@dataclass(frozen=True)
class Cell:
    """One cell of the heat map.

    Attributes:
        task: a name of `TASKS`.
        length: tokens of the whole prompt.
        depth: share of the haystack before the needle; None for a task without one.
    """

    task: str
    length: int
    depth: float | None


@dataclass(frozen=True)
class Plan:
    """All that decides the prompts of a run, but for the tokenizer.

    Attributes:
        tasks: names of `TASKS`.
        lengths: tokens of the whole prompt as the model sees it, ascending.
        depths: shares of the haystack before the needle, ascending.
        trials: prompts a cell; a task without depth gets as many a length as the others.
        seed: of everything that is drawn.
        paired: the same things are hidden and asked at every length.
        max_tokens: longest answer.
        wording: of needles and questions.
        sizes: how much is hidden.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int
    paired: bool
    max_tokens: int
    wording: Wording
    sizes: TaskSizes

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.tasks) * len(self.lengths) * len(self.depths) * self.trials

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return len(self) // len(self.lengths) * sum(self.lengths)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object, for the settings of a run."""
        return asdict(self) | {name: list(getattr(self, name)) for name in _LISTS} | _texts(self)

    def questions(self, builder: PromptBuilder) -> Iterator[Question]:
        """Every prompt of the plan, made when it is taken.

        Raises:
            ConfigError: a length is too short for what is hidden.
        """
        for task in self.tasks:
            for length in self.lengths:
                for depth in self.depths:
                    for trial in range(self.trials):
                        yield self._question(builder, task, length, depth, trial)

    def _question(
        self, builder: PromptBuilder, task: str, length: int, depth: float, trial: int
    ) -> Question:
        """One prompt; its key names the cell and the trial."""
        shared = "" if self.paired else f"{length}/"
        name = f"{self.seed}/{task}/{shared}{depth:g}/{trial}"
        item = TASKS[task](Random(f"{name}/item"), depth, self.wording, self.sizes)
        content = builder.build(item, length, Random(f"{name}/haystack"))
        return Question(
            f"{task}/{length}/{depth:g}/{trial}",
            ({"role": "user", "content": content},),
            self.max_tokens,
            _metadata(item, Cell(task, length, depth if item.needles else None)),
        )


_LISTS = ("tasks", "lengths", "depths")


def _texts(plan: Plan) -> dict[str, Any]:
    """Wording and sizes as JSON objects."""
    wording = asdict(plan.wording) | {"keys": list(plan.wording.keys)}
    return {"wording": wording, "sizes": asdict(plan.sizes)}


def _metadata(item: Item, cell: Cell) -> dict[str, Any]:
    """What an answer is scored with."""
    return {
        **asdict(cell),
        "references": list(item.references),
        "others": list(item.others),
    }


def default_lengths(limits: Limits, max_tokens: int) -> tuple[int, ...]:
    """From half of index_topk up by doubling, and the longest prompt that leaves room to answer.

    Raises:
        ConfigError: the model's longest sequence is unknown, or leaves no room.
    """
    longest = _longest(limits, max_tokens)
    first = max((limits.index_topk or longest // 16) // 2, 1)
    doubled = [first << power for power in range(32) if first << power < longest]
    if doubled and doubled[-1] > 0.9 * longest:
        doubled.pop()
    return (*doubled, longest)


def continuity_lengths(limits: Limits, max_tokens: int) -> tuple[int, ...]:
    """Lengths on both sides of index_topk; the first is dense to the end of its answer.

    Raises:
        ConfigError: index_topk is unknown, or the lengths do not fit into the model.
    """
    topk = _topk(limits)
    steps = (-max_tokens, -2, -1, 0, 1, 2, max_tokens, topk)
    lengths = tuple(sorted({topk + step for step in steps}))
    _check_lengths(lengths, limits, max_tokens)
    return lengths


def parse_lengths(text: str, limits: Limits, max_tokens: int) -> tuple[int, ...]:
    """Lengths of a list such as `512,topk,topk+1,4*topk,max`, ascending, each once.

    Args:
        text: numbers of tokens; `topk` is index_topk, `max` the longest prompt that leaves room
            for an answer; both may have a factor before and a number added.

    Raises:
        ConfigError: an entry is none of these, or is longer than the model takes.
    """
    lengths = tuple(sorted({_length(part.strip(), limits, max_tokens) for part in text.split(",")}))
    _check_lengths(lengths, limits, max_tokens)
    return lengths


def _length(part: str, limits: Limits, max_tokens: int) -> int:
    """One length."""
    match = _LENGTH.fullmatch(part)
    factor, name, number = match.groups() if match else (None, None, None)
    if not part or not match or (name and number and number[0] not in "+-"):
        raise ConfigError(
            f"--lengths: got {part!r}; allowed are numbers of tokens, topk, max, and such as "
            "topk+1 or 4*topk"
        )
    base = 0
    if name:
        base = _topk(limits) if name == "topk" else _longest(limits, max_tokens)
    return base * int(factor or 1) + int(number or 0)


def _topk(limits: Limits) -> int:
    """The model's index_topk."""
    if limits.index_topk is None:
        raise ConfigError(
            "--index-topk: unknown, for config.json of the tokenizer's folder does not name it; "
            "give it"
        )
    return limits.index_topk


def _longest(limits: Limits, max_tokens: int) -> int:
    """The longest prompt that leaves room for an answer."""
    if limits.max_model_len is None:
        raise ConfigError(
            "--lengths: not given, and the server does not say how long a sequence may be; give "
            "them as numbers"
        )
    if limits.max_model_len <= max_tokens:
        raise ConfigError(
            f"--max-tokens: got {max_tokens}; the model takes {limits.max_model_len} tokens in all"
        )
    return limits.max_model_len - max_tokens


def _check_lengths(lengths: tuple[int, ...], limits: Limits, max_tokens: int) -> None:
    """Every length is at least 1 and leaves room for an answer."""
    for length in lengths:
        if length < 1:
            raise ConfigError(f"--lengths: got {length}; must be above 0")
        if limits.max_model_len is not None and length + max_tokens > limits.max_model_len:
            raise ConfigError(
                f"--lengths: got {length}; with {max_tokens} tokens for the answer the model's "
                f"{limits.max_model_len} allow {max(limits.max_model_len - max_tokens, 0)}"
            )


def parse_depths(text: str) -> tuple[float, ...]:
    """Depths of a list such as `0,0.5,1`, ascending, each once.

    Raises:
        ConfigError: an entry is no number from 0 to 1.
    """
    found = set()
    for part in text.split(","):
        try:
            depth = float(part)
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 1:
            raise ConfigError(
                f"--depths: got {part.strip()!r}; allowed are numbers from 0 (start) to 1 (end)"
            )
        found.add(round(depth, 4))
    return tuple(sorted(found))


def parse_tasks(text: str) -> tuple[str, ...]:
    """Tasks of a list such as `passkey,variables`, in the order of `TASKS`.

    Raises:
        ConfigError: an unknown task.
    """
    asked = [part.strip() for part in text.split(",")]
    for task in asked:
        if task not in TASKS:
            raise ConfigError(f"--tasks: unknown task {task!r}; allowed are {', '.join(TASKS)}")
    return tuple(task for task in TASKS if task in asked)
