"""Prompts of an exact number of tokens: a haystack, needles at their depths, a question.

The haystack is sentences of old tales, carried in the package. It is filled up by whole sentences;
the last one is cut and patched with small words until the tokenizer counts what was asked for, chat
template included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from fd_dsa.accuracy.retrieval.tasks import BEFORE, Item
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import ConfigError
from fd_dsa.models.config_reader import FieldReader, read_json_object

# a haystack's last sentence is at least so long: shorter ones can hardly be cut to size
_MIN_LAST_TOKENS = 8
_MAX_CORRECTIONS = 12
# each is one token of most tokenizers; the marks are one of nearly all
_PATCHES = (" then", " now", " too", " there", " so", " a", " I", "!", ".", "?")


@cache
def sentences() -> tuple[str, ...]:
    """Sentences of public-domain tales in their order (`data/ORIGIN.md`); ASCII, no digit."""
    file = Path(__file__).with_name("data") / "haystack.txt"
    return tuple(file.read_text("utf-8").splitlines())


def endless(random: Random) -> Iterator[str]:
    """The sentences from a random one on, again from the first after the last, without end."""
    return islice(cycle(sentences()), random.randrange(len(sentences())), None)


class PromptBuilder:
    """Makes prompts whose lengths `counter` counts; keeps the counts of the sentences it has seen.

    A length that is too short for what is hidden, or that the tokenizer never counts exactly, is a
    ConfigError.
    """

    def __init__(self, counter: TokenCounter) -> None:
        self._counter = counter
        self._sizes: dict[str, int] = {}

    def build(self, item: Item, length: int, random: Random) -> str:
        """Content of the user message."""
        fixed = self._counter.prompt(_compose(item, []))
        room = length - fixed
        if room < _MIN_LAST_TOKENS:
            raise ConfigError(
                f"--lengths: got {length}; the question and what is hidden take {fixed} tokens "
                f"alone, so at least {fixed + _MIN_LAST_TOKENS} are needed"
            )
        lines, source = self._whole_sentences(random, room)
        left = room - sum(map(self._size, lines))
        for _ in range(_MAX_CORRECTIONS):
            if left < _MIN_LAST_TOKENS and lines:
                left += self._size(lines.pop())
            last = self._sentence_of(left, source)
            content = _compose(item, self._with_needles(item, [*lines, last]))
            surplus = self._counter.prompt(content) - length
            if surplus == 0:
                return content
            left -= surplus
        raise ConfigError(
            f"--lengths: got {length}; with this tokenizer no prompt of exactly that length could "
            "be made; ask for another length"
        )

    def _whole_sentences(self, random: Random, room: int) -> tuple[list[str], list[str]]:
        """Sentences of at most `room` tokens, and those that follow for the one to cut."""
        stream = endless(random)
        lines: list[str] = []
        sentence = next(stream)
        while self._size(sentence) <= room:
            lines.append(sentence)
            room -= self._size(sentence)
            sentence = next(stream)
        return lines, [sentence, *islice(stream, 8)]

    def _sentence_of(self, size: int, source: Sequence[str]) -> str:
        """Words of `source` as one sentence of `size` tokens, as near as the tokenizer allows."""
        words = " ".join(source).replace(".", "").replace("?", "").replace("!", "").split()
        low, high = 1, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._counter.text(" " + " ".join(words[:middle]) + ".") <= size
            low, high = (middle, high) if fits else (low, middle - 1)
        text = " ".join(words[:low])
        for _ in range(size):
            missing = size - self._counter.text(f" {text}.")
            if missing <= 0:
                break
            grown = (text + patch for patch in _PATCHES)
            text = next(
                (t for t in grown if 0 <= size - self._counter.text(f" {t}.") < missing), text
            )
        return f"{text}."

    def _with_needles(self, item: Item, lines: Sequence[str]) -> list[str]:
        """The lines with each needle at the border of sentences nearest to its depth."""
        borders = [0]
        for line in lines:
            borders.append(borders[-1] + self._size(line))
        inserts: dict[int, list[str]] = {}
        for needle in sorted(item.needles, key=lambda needle: needle.depth):
            target = needle.depth * borders[-1]
            nearest = min(range(len(borders)), key=lambda place: abs(borders[place] - target))
            inserts.setdefault(nearest, []).append(needle.sentence)
        found: list[str] = []
        for place in range(len(borders)):
            found += inserts.get(place, [])
            found += lines[place : place + 1]
        return found

    def _size(self, sentence: str) -> int:
        """Tokens of a sentence with the space before it."""
        if sentence not in self._sizes:
            self._sizes[sentence] = self._counter.text(" " + sentence)
        return self._sizes[sentence]


def _compose(item: Item, lines: Sequence[str]) -> str:
    """The message; without lines it holds the needles alone."""
    body = " ".join(lines or [needle.sentence for needle in item.needles])
    return "\n\n".join((BEFORE, body, item.question))


class TokenCounter:
    """Counts tokens as the model of a folder does.

    Args:
        folder: with tokenizer.json; config.json is read where it is there.
        thinking: handed to the chat template as the client does; None leaves it its default.

    Attributes:
        index_topk, max_position_embeddings: of config.json; None where it does not say.
    """

    def __init__(self, folder: Path, thinking: bool | None = None) -> None:
        if not folder.is_dir():
            raise ConfigError(f"--tokenizer: {folder} is no folder")
        self.folder = folder
        self._tokenizer = Tokenizer.from_folder(folder)
        switch = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        self._kwargs: dict[str, Any] = dict(switch)
        config = folder / "config.json"
        known = read_json_object(config) if config.is_file() else {}
        names = ("index_topk", "max_position_embeddings")
        reader = FieldReader(known, f"--tokenizer: {config}")
        self.index_topk, self.max_position_embeddings = (
            reader.integer(name, None) if name in known else None for name in names
        )

    def text(self, text: str) -> int:
        """Tokens of a text inside a longer one."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, content: str) -> int:
        """Tokens of a conversation of this one user message, start of the answer included.

        Without a chat template those of the text alone, with the tokenizer's own special tokens.
        """
        if not self._tokenizer.has_chat_template:
            return len(self._tokenizer.encode(content))
        messages = [{"role": "user", "content": content}]
        try:
            return len(self._tokenizer.apply_chat_template(messages, **self._kwargs))
        except ValueError as error:
            raise ConfigError(f"--tokenizer: {self.folder}: {error}") from error
