"""Conversations in which a number is hidden, and where each of its tokens stands.

The answer is given token by token, so at every token of the number the model must look up the next
one: the token before it in the answer is a query, the same token in the text its needle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from fd_dsa.accuracy.retrieval.prompts import PromptBuilder
from fd_dsa.accuracy.retrieval.tasks import TaskSizes, passkey
from fd_dsa.accuracy.retrieval.tokens import TokenCounter
from fd_dsa.accuracy.retrieval.wordings import PLAIN
from fd_dsa.errors import ConfigError

if TYPE_CHECKING:
    from fd_dsa.accuracy.embedded import OpenModel
    from fd_dsa.engine.tokenizer import Tokenizer

# multiples of it, cut to [0, 1), lie evenly however many they are
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class NeedleText:
    """A conversation with its answer begun.

    Attributes:
        prompt: token ids up to the start of the answer.
        answer: token ids of the answer, the last one that of the query for the number's end.
        pairs: (query, needle): positions in prompt + answer; at the query the model must give the
            token that stands at the needle.
        depth: share of the text before the needle, 0 to 1.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    depth: float

    @property
    def queries(self) -> tuple[int, ...]:
        """Positions of the queries."""
        return tuple(query for query, _ in self.pairs)

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation."""
        return len(self.prompt) + len(self.answer)


def needle_texts(model: OpenModel, length: int, count: int, seed: int) -> Iterator[NeedleText]:
    """Conversations whose prompts have exactly `length` tokens, needles at depths between 0 and 1.

    The same arguments and tokenizer give the same conversations.

    Raises:
        ConfigError: the length is too short for the task, or the tokenizer does not say which
            bytes a token stands for, or cuts the number otherwise in the answer.
    """
    builder = PromptBuilder(TokenCounter(model.engine_config.model_path))
    for index in range(count):
        # a text depends on its own number alone: more texts leave the first ones as they were
        random = Random(f"{seed}:{length}:{index}")
        depth = (index + 0.5) * _GOLDEN % 1
        item = passkey(random, depth, PLAIN, TaskSizes())
        content = builder.build(item, length, random)
        (value,) = item.references
        sentence = item.needles[0].sentence
        yield _with_answer(model.tokenizer, content, sentence, value, depth)


def _with_answer(
    tokenizer: Tokenizer, content: str, sentence: str, value: str, depth: float
) -> NeedleText:
    """The conversation of a user's message, answered by its needle's sentence up to the value."""
    if tokenizer.has_chat_template:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": content}])
    else:
        prompt = tokenizer.encode(content)
    begun = sentence[: sentence.index(value) + len(value)]
    answer = tokenizer.encode(begun, add_special_tokens=False)
    needle, copy = tokens_of(tokenizer, prompt, value), tokens_of(tokenizer, answer, value)
    if [prompt[p] for p in needle] != [answer[p] for p in copy]:
        raise ConfigError(
            f"selection: the tokenizer cuts {value!r} otherwise in the answer than in the text"
        )
    start = len(prompt) - 1
    pairs = tuple((start + place, found) for place, found in zip(copy, needle, strict=True))
    return NeedleText(tuple(prompt), tuple(answer[: copy[-1]]), pairs, depth)


def tokens_of(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Positions of the tokens that `text` is written with, which stands in `token_ids` once.

    Raises:
        ConfigError: the tokenizer is not byte-level, or the text is not there once.
    """
    table = tokenizer.token_bytes
    if table is None:
        raise ConfigError(
            "selection: the tokenizer is not byte-level, so the needle's tokens cannot be found"
        )
    pieces = [table[token] for token in token_ids]
    joined, wanted = b"".join(pieces), text.encode()
    if joined.count(wanted) != 1:
        raise ConfigError(
            f"selection: {text!r} stands {joined.count(wanted)} times in the text, not once"
        )
    start = joined.index(wanted)
    found, offset = [], 0
    for place, piece in enumerate(pieces):
        if offset < start + len(wanted) and offset + len(piece) > start:
            found.append(place)
        offset += len(piece)
    return found
