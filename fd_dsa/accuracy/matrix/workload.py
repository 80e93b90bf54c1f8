"""What every mode is asked: IFEval prompts, things to find in long texts, texts to go on with.

The first two are scored; the last have no end of their own and leave the model the least sure, so
they are the hardest to agree on. Short ones of these come first: in a small cache they soon need
more blocks than there are. All others are mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from fd_dsa.accuracy.matrix.recording import Request
from fd_dsa.accuracy.prompts import Prompt, read_prompts
from fd_dsa.accuracy.retrieval.haystack import endless
from fd_dsa.accuracy.retrieval.plan import Limits, Plan, parse_lengths
from fd_dsa.accuracy.retrieval.prompts import PromptBuilder
from fd_dsa.accuracy.retrieval.tasks import TaskSizes
from fd_dsa.accuracy.retrieval.tokens import TokenCounter
from fd_dsa.accuracy.retrieval.wordings import PLAIN
from fd_dsa.accuracy.types import Question
from fd_dsa.errors import ConfigError

if TYPE_CHECKING:
    from fd_dsa.engine.tokenizer import Tokenizer

IFEVAL, RETRIEVAL, TEXT = "ifeval", "retrieval", "text"


@dataclass(frozen=True)
class Hidden:
    """Retrieval prompts: one of each task, length and depth.

    Attributes:
        tasks: names of `retrieval.tasks.TASKS`.
        lengths: of the prompts, as `retrieval --lengths` takes them.
        depths: of what is hidden.
    """

    tasks: tuple[str, ...]
    lengths: str
    depths: tuple[float, ...]


@dataclass(frozen=True)
class Passages:
    """Texts to go on with.

    Attributes:
        count: how many.
        length: tokens of each, where the model takes as many.
        tokens: how far it goes on, whatever the model says.
    """

    count: int
    length: int
    tokens: int


@dataclass(frozen=True)
class Scale:
    """How much is asked.

    Attributes:
        ifeval: prompts, taken evenly from the official ones.
        ifeval_tokens: longest answer to one of them.
        retrieval: what is hidden and asked.
        retrieval_tokens: longest answer.
        texts: what to go on with; the first ones come before all other requests.
        perplexity_tokens: of the text whose perplexity is measured, at most.
        short: tokens of the longest request of modes that leave long ones out.
    """

    ifeval: int
    ifeval_tokens: int
    retrieval: tuple[Hidden, ...]
    retrieval_tokens: int
    texts: tuple[Passages, ...]
    perplexity_tokens: int
    short: int


_TASKS = ("passkey", "multikey", "variables")
FULL = Scale(
    ifeval=64,
    ifeval_tokens=192,
    # long prompts take most of the time: few of them
    retrieval=(
        Hidden(_TASKS, "topk,4*topk", (0.1, 0.5, 0.9)),
        Hidden(_TASKS, "12*topk", (0.1,)),
        Hidden(_TASKS[:1], "max", (0.1,)),
    ),
    retrieval_tokens=40,
    texts=(
        Passages(8, 60, 192),
        Passages(4, 300, 96),
        Passages(4, 700, 96),
        Passages(4, 1500, 96),
    ),
    perplexity_tokens=4096,
    short=1200,
)
QUICK = Scale(
    ifeval=3,
    ifeval_tokens=8,
    retrieval=(Hidden(_TASKS[:1], "topk+60", (0.1,)),),
    retrieval_tokens=12,
    # each needs its second block after a few tokens
    texts=(Passages(6, 60, 10),),
    perplexity_tokens=300,
    short=350,
)


@dataclass(frozen=True)
class Workload:
    """The requests of a matrix, and what their answers are scored with.

    Attributes:
        requests: in the order in which they come.
        prompts: IFEval's; the key of a request is `ifeval/` and that of its prompt.
        questions: of retrieval, by the key of their request.
        scale: how much was asked.
    """

    requests: tuple[Request, ...]
    prompts: tuple[Prompt, ...]
    questions: dict[str, Question]
    scale: Scale

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(request.token_ids) for request in self.requests)

    @property
    def longest_sequence(self) -> int:
        """Tokens of prompt and answer."""
        return max(len(request.token_ids) + request.max_tokens for request in self.requests)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all requests, in hexadecimal."""
        text = json.dumps([asdict(request) for request in self.requests])
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def without_long_ones(self) -> Workload:
        """The same without requests that are longer than `Scale.short`."""
        kept = [r for r in self.requests if len(r.token_ids) + r.max_tokens <= self.scale.short]
        return replace(self, requests=tuple(kept))

    def blocks(self, num_requests: int, block_size: int) -> int:
        """Cache blocks for that many of the longest requests at once."""
        ends = sorted((len(r.token_ids) + r.max_tokens - 1 for r in self.requests), reverse=True)
        return sum(-(-end // block_size) for end in ends[:num_requests])

    def facts(self) -> dict[str, Any]:
        """What reports say of it."""
        return {
            "requests": len(self.requests),
            "prompt_tokens": sum(len(request.token_ids) for request in self.requests),
            "longest_prompt": self.longest_prompt,
            "num_texts": sum(passages.count for passages in self.scale.texts),
            "retrieval_lengths": sorted({q.metadata["length"] for q in self.questions.values()}),
            **asdict(self.scale),
        }


def make_workload(folder: Path, tokenizer: Tokenizer, limits: Limits, scale: Scale) -> Workload:
    """The requests for a model.

    Args:
        folder: of the model, whose chat template asks the questions.
        tokenizer: of the same folder.
        limits: of the model.
        scale: how much to ask.

    Raises:
        ConfigError: the model has no chat template, or is too short for what is asked.
    """
    if not tokenizer.has_chat_template:
        raise ConfigError(f"--model: {folder} has no chat template, and questions need one")
    if limits.max_model_len is None:
        raise ConfigError(f"--model: {folder} does not say how long a sequence may be")
    prompts = _some(read_prompts(), scale.ifeval)
    questions = [prompt.to_question(scale.ifeval_tokens) for prompt in prompts]
    ifeval = [_asked(IFEVAL, question, tokenizer) for question in questions]
    hidden = _retrieval(folder, limits, scale)
    retrieval = [_asked(RETRIEVAL, question, tokenizer) for question in hidden]
    texts = _texts(tokenizer, limits.max_model_len, scale)
    ifeval = [r for r in ifeval if len(r.token_ids) + r.max_tokens <= limits.max_model_len]
    kept = {request.key for request in ifeval}
    return Workload(
        (*texts[0], *_mixed(ifeval, retrieval, *texts[1:])),
        tuple(prompt for prompt in prompts if f"{IFEVAL}/{prompt.key}" in kept),
        {f"{RETRIEVAL}/{question.key}": question for question in hidden},
        scale,
    )


def _some(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts, evenly spaced."""
    count = min(count, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _asked(group: str, question: Question, tokenizer: Tokenizer) -> Request:
    """A question as the request that the server would make of it."""
    token_ids = tokenizer.apply_chat_template(list(question.messages))
    return Request(f"{group}/{question.key}", tuple(token_ids), question.max_tokens)


def _retrieval(folder: Path, limits: Limits, scale: Scale) -> list[Question]:
    """Things hidden in long texts."""
    builder = PromptBuilder(TokenCounter(folder))
    found: dict[str, Question] = {}
    for hidden in scale.retrieval:
        plan = Plan(
            hidden.tasks,
            parse_lengths(hidden.lengths, limits, scale.retrieval_tokens),
            hidden.depths,
            trials=1,
            seed=0,
            paired=False,
            max_tokens=scale.retrieval_tokens,
            wording=PLAIN,
            sizes=TaskSizes(),
        )
        found |= {question.key: question for question in plan.questions(builder)}
    return list(found.values())


def _texts(tokenizer: Tokenizer, max_model_len: int, scale: Scale) -> list[list[Request]]:
    """Passages of tales, cut anywhere."""
    found = []
    for number, passages in enumerate(scale.texts):
        wanted = min(passages.length, max_model_len - passages.tokens)
        group = []
        for index in range(passages.count):
            stream, text = endless(Random(f"matrix:{number}:{index}")), ""
            while len(token_ids := tokenizer.encode(text)) < wanted:
                text += " ".join(next(stream) for _ in range(20)) + " "
            key = f"{TEXT}/{passages.length}/{index}"
            group.append(Request(key, tuple(token_ids[:wanted]), passages.tokens, True))
        found.append(group)
    return found


def _mixed(*groups: Sequence[Request]) -> list[Request]:
    """All requests, those of each group evenly spread."""
    placed = [
        ((index + 0.5) / len(group), number, request)
        for number, group in enumerate(groups)
        for index, request in enumerate(group)
    ]
    return [request for _, _, request in sorted(placed, key=lambda entry: entry[:2])]
