"""The prompts of a run: tasks x lengths x depths x trials, generated from one seed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from random import Random
from typing import Any, NamedTuple

from fd_dsa.accuracy.retrieval.prompts import CHAINS, HOPS, KEYS, TASKS, PromptBuilder
from fd_dsa.client.questions import Question
from fd_dsa.errors import ConfigError

DEFAULT_DEPTHS, CONTINUITY_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 1.0)
_LENGTH = re.compile(r"(?:(?:(\d+)\*)?(topk|max))?([+-]?\d+)?")


class Limits(NamedTuple):
    """Number of selected keys, and maximum sequence length in tokens. None = unknown."""

    index_topk: int | None
    max_model_len: int | None


@dataclass(frozen=True)
class Cell:
    """The items of one task, prompt length and depth."""

    task: str
    length: int
    depth: float


@dataclass(frozen=True)
class Plan:
    """The parameters that determine the prompts of a run, except the tokenizer.

    Attributes:
        lengths: lengths of the whole prompt in tokens, ascending.
        depths: shares of the haystack before the needle, ascending.
        paired: True if every length hides the same things.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int
    paired: bool
    max_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object, for the settings of a run."""
        lists = {n: list(getattr(self, n)) for n in ("tasks", "lengths", "depths")}
        return asdict(self) | lists | {"sizes": {"keys": KEYS, "chains": CHAINS, "hops": HOPS}}

    def questions(self, builder: PromptBuilder) -> Iterator[Question]:
        """Yield every prompt of the plan, made on demand."""
        cells = product(self.tasks, self.lengths, self.depths, range(self.trials))
        for task, length, depth, trial in cells:
            shared = "" if self.paired else f"{length}/"
            name = f"{self.seed}/{task}/{shared}{depth:g}/{trial}"
            item = TASKS[task](Random(f"{name}/item"), depth)
            content = builder.build(item, length, Random(f"{name}/haystack"))
            asked = {"references": list(item.references), "others": list(item.others)}
            yield Question(
                f"{task}/{length}/{depth:g}/{trial}",
                ({"role": "user", "content": content},),
                self.max_tokens,
                {**asdict(Cell(task, length, depth)), **asked},
            )


def default_lengths(limits: Limits, max_tokens: int) -> tuple[int, ...]:
    """Return half of index_topk, doubled up to the longest prompt that leaves room."""
    longest = _longest(limits, max_tokens)
    first = max((limits.index_topk or longest // 16) // 2, 1)
    doubled = [first << power for power in range(32) if first << power < longest]
    if doubled and doubled[-1] > 0.9 * longest:
        doubled.pop()
    return (*doubled, longest)


def continuity_lengths(limits: Limits, max_tokens: int) -> tuple[int, ...]:
    """Return lengths on both sides of index_topk.

    The first is dense for the whole answer.
    """
    topk = _topk(limits)
    steps = (-max_tokens, -2, -1, 0, 1, 2, max_tokens, topk)
    return _checked({topk + step for step in steps}, limits, max_tokens)


def parse_lengths(text: str, limits: Limits, max_tokens: int) -> tuple[int, ...]:
    """Parse a list such as `512,topk,topk+1,4*topk,max` into distinct ascending lengths.

    `topk` is index_topk, `max` the longest prompt that leaves room for an answer. Both may have a
    preceding factor and an added number.
    """
    lengths = {_length(part.strip(), limits, max_tokens) for part in text.split(",")}
    return _checked(lengths, limits, max_tokens)


def _length(part: str, limits: Limits, max_tokens: int) -> int:
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
    if limits.index_topk is None:
        raise ConfigError(
            "--index-topk: unknown, for config.json of the tokenizer's folder does not name it; "
            "give it"
        )
    return limits.index_topk


def _longest(limits: Limits, max_tokens: int) -> int:
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


def _checked(lengths: set[int], limits: Limits, max_tokens: int) -> tuple[int, ...]:
    for length in sorted(lengths):
        if length < 1:
            raise ConfigError(f"--lengths: got {length}; must be above 0")
        if limits.max_model_len is not None and length + max_tokens > limits.max_model_len:
            raise ConfigError(
                f"--lengths: got {length}; with {max_tokens} tokens for the answer the model's "
                f"{limits.max_model_len} allow {max(limits.max_model_len - max_tokens, 0)}"
            )
    return tuple(sorted(lengths))


def parse_depths(text: str) -> tuple[float, ...]:
    """Parse a list such as `0,0.5,1` into distinct ascending depths."""
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
    """Parse a list such as `passkey,variables` into tasks, in the order of `TASKS`."""
    asked = [part.strip() for part in text.split(",")]
    for task in asked:
        if task not in TASKS:
            raise ConfigError(f"--tasks: unknown task {task!r}; allowed are {', '.join(TASKS)}")
    return tuple(task for task in TASKS if task in asked)
