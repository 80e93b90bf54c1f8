"""Prompts of an exact number of tokens: a haystack, needles at their depths, a question.

The haystack is filled up by whole sentences; the last one is cut and patched with small words until
the tokenizer counts what was asked for, chat template included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Protocol

from fd_dsa.accuracy.retrieval.haystack import endless
from fd_dsa.accuracy.retrieval.tasks import Item
from fd_dsa.errors import ConfigError

# a haystack's last sentence is at least so long: shorter ones can hardly be cut to size
_MIN_LAST_TOKENS = 8
_MAX_CORRECTIONS = 12
# each is one token of most tokenizers; the marks are one of nearly all
_PATCHES = (" then", " now", " too", " there", " so", " a", " I", "!", ".", "?")


class Counter(Protocol):
    """Counts tokens as the served model does."""

    def text(self, text: str) -> int:
        """Tokens of a text that stands inside a longer one."""

    def prompt(self, content: str) -> int:
        """Tokens of a conversation of this one user message, start of the answer included."""


class PromptBuilder:
    """Makes prompts; keeps the token counts of the sentences it has seen.

    Args:
        counter: of the tokenizer that lengths are counted with.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._sizes: dict[str, int] = {}

    def build(self, item: Item, length: int, random: Random) -> str:
        """Content of the user message.

        Args:
            item: what is hidden and asked.
            length: tokens of the whole prompt as the model sees it.
            random: chooses where in the tales the haystack begins.

        Raises:
            ConfigError: the needles and the question alone are longer, or the tokenizer never
                counts `length` exactly.
        """
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
        for sentence in stream:
            size = self._size(sentence)
            if size > room:
                return lines, [sentence, *_take(stream, 8)]
            lines.append(sentence)
            room -= size
        raise AssertionError("the stream has no end")

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
            wanted = needle.depth * borders[-1]
            nearest = min(range(len(borders)), key=lambda place: abs(borders[place] - wanted))
            inserts.setdefault(nearest, []).append(needle.sentence)
        found: list[str] = []
        for place in range(len(borders)):
            found += inserts.get(place, [])
            found += lines[place : place + 1]
        return found

    def _size(self, sentence: str) -> int:
        """Tokens of a sentence with the space before it."""
        size = self._sizes.get(sentence)
        if size is None:
            size = self._sizes[sentence] = self._counter.text(" " + sentence)
        return size


def _compose(item: Item, lines: Sequence[str]) -> str:
    """The message; without lines only the needles stand between the words and the question."""
    body = " ".join(lines or [needle.sentence for needle in item.needles])
    return "\n\n".join(part for part in (item.before, body, item.question) if part)


def _take(stream: Iterator[str], count: int) -> list[str]:
    """The next sentences of the stream."""
    return [next(stream) for _ in range(count)]
