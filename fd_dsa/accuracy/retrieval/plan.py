"""The prompts of a run: tasks x lengths x depths x trials, generated from one seed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from random import Random
from typing import Any

from fd_dsa.accuracy.retrieval.prompts import TASKS, PromptBuilder
from fd_dsa.client.questions import Question
from fd_dsa.command_line.values import check_prompt_tokens
from fd_dsa.errors import ConfigError, shorten

_LENGTH = re.compile(r"(?:(?:(\d+)\*)?(topk|max))?([+-]?\d+)?")


@dataclass(frozen=True)
class Limits:
    """Bounds of the lengths of prompts and answers, in tokens. None = unknown.

    Attributes:
        max_model_len: maximum length of a prompt with its answer.
    """

    index_topk: int | None
    max_model_len: int | None
    max_tokens: int

    @property
    def topk(self) -> int:
        """Number of keys that the indexer selects."""
        if self.index_topk is None:
            raise ConfigError(
                "--index-topk: unknown, for config.json of the tokenizer's folder does not name "
                "it; give it"
            )
        return self.index_topk

    @property
    def longest(self) -> int:
        """Length of the longest prompt that leaves room for an answer."""
        if self.max_model_len is None:
            raise ConfigError(
                "--lengths: not given, and the server does not say how long a sequence may be; "
                "give them as numbers"
            )
        if self.max_model_len <= self.max_tokens:
            raise ConfigError(
                f"--max-tokens: got {self.max_tokens}; the model takes {self.max_model_len} tokens "
                "in all"
            )
        return self.max_model_len - self.max_tokens


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

    def __post_init__(self) -> None:
        each = len(self.tasks) * len(self.depths) * sum(self.lengths)
        check_prompt_tokens("--trials, --lengths and --depths", self.trials * each)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object, for the settings of a run."""
        return asdict(self) | {n: list(getattr(self, n)) for n in ("tasks", "lengths", "depths")}

    def questions(self, builder: PromptBuilder) -> Iterator[Question]:
        """Yield every prompt of the plan, made on demand. Its key is task/length/depth/trial."""
        cells = product(self.tasks, self.lengths, self.depths, range(self.trials))
        for task, length, depth, trial in cells:
            shared = "" if self.paired else f"{length}/"
            name = f"{self.seed}/{task}/{shared}{depth:g}/{trial}"
            item = TASKS[task](Random(f"{name}/item"), depth)
            content = builder.build(item, length, Random(f"{name}/haystack"))
            yield Question(
                f"{task}/{length}/{depth:g}/{trial}",
                ({"role": "user", "content": content},),
                self.max_tokens,
                {"references": list(item.references), "others": list(item.others)},
            )


def default_lengths(limits: Limits) -> tuple[int, ...]:
    """Return half of index_topk, doubled up to the longest prompt that leaves room."""
    longest = limits.longest
    first = max((limits.index_topk or longest // 16) // 2, 1)
    doubled = [first << power for power in range(32) if first << power < longest]
    if doubled and doubled[-1] > 0.9 * longest:
        doubled.pop()
    return (*doubled, longest)


def parse_lengths(text: str, limits: Limits) -> tuple[int, ...]:
    """Parse a list such as `512,topk,topk+1,4*topk,max` into distinct ascending lengths.

    `topk` is index_topk, `max` the longest prompt that leaves room for an answer. Both may have a
    preceding factor and an added number.
    """
    lengths = sorted({_length(part.strip(), limits) for part in text.split(",")})
    for length in lengths:
        if length < 1:
            raise ConfigError(f"--lengths: got {length}; must be above 0")
        if limits.max_model_len is not None and length > limits.longest:
            raise ConfigError(
                f"--lengths: got {length}; with {limits.max_tokens} tokens for the answer the "
                f"model's {limits.max_model_len} allow {limits.longest}"
            )
    return tuple(lengths)


def _length(part: str, limits: Limits) -> int:
    match = _LENGTH.fullmatch(part)
    factor, name, number = match.groups() if match else (None, None, None)
    if not part or not match or (name and number and number[0] not in "+-"):
        raise ConfigError(
            f"--lengths: got {shorten(part)}; allowed are numbers of tokens, topk, max, and such "
            "as topk+1 or 4*topk"
        )
    base = 0
    if name:
        base = limits.topk if name == "topk" else limits.longest
    return base * int(factor or 1) + int(number or 0)
