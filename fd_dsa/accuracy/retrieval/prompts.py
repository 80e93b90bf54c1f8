"""Prompts that hide something: what is hidden and asked, and texts of an exact number of tokens.

The tasks are a pass key, numbers with keys, and chains of variables. Everything is drawn from a
`random.Random`, so the same seed hides the same things. No hidden string is in the haystack, and
none is part of another. The words are those of a reader who asks for facts, as the demo model was
trained to be asked.

The haystack is sentences of old tales, carried in the package. It is filled up by whole sentences;
the last one is cut and patched with small words until the tokenizer counts what was asked for, chat
template included.

Source of the tasks: RULER, arXiv 2404.06654; pass keys: Mohtashami and Jaggi, arXiv 2305.16300.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from random import Random
from string import ascii_uppercase
from typing import Any

from fd_dsa.client.settings import reasoning_switch
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import ConfigError
from fd_dsa.models.config_reader import FieldReader, read_json_object

BEFORE = "Read the text and answer the question at its end."
KEYS, CHAINS, HOPS = 4, 2, 3
"""Numbers with keys, chains of variables, and statements of a chain after its first."""


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, and the share of the haystack's tokens before it."""

    sentence: str
    depth: float


@dataclass(frozen=True)
class Item:
    """One question and what is hidden for it.

    Attributes:
        needles: those of equal depth in order.
        references: the strings that a right answer names.
        others: hidden strings of the same kind, which a right answer does not name.
    """

    needles: tuple[Needle, ...]
    question: str
    references: tuple[str, ...]
    others: tuple[str, ...] = ()


def passkey(random: Random, depth: float) -> Item:
    """One number at `depth`."""
    (value,) = _numbers(random, 1)
    needle = Needle(f"The pass key is {value}. Remember it.", depth)
    return Item((needle,), "What is the pass key?", (value,))


def multikey(random: Random, depth: float) -> Item:
    """Numbers with keys anywhere; the one that is asked for at `depth`."""
    keys = random.sample(cities(), KEYS)
    values = _numbers(random, KEYS)
    needles: list[Needle] = []
    for key, value in zip(keys, values, strict=True):
        place = random.random() if needles else depth
        needles.append(Needle(f"The special number for {key} is {value}.", place))
    first, *others = values
    question = f"What is the special number for {keys[0]}?"
    return Item(tuple(needles), question, (first,), tuple(others))


def variables(random: Random, depth: float) -> Item:
    """Chains of assignments; the one that is asked for begins at `depth`, its rest comes later.

    The statements of a chain are in order, with those of other chains anywhere between them.
    """
    length = HOPS + 1
    drawn: dict[str, None] = {}
    while len(drawn) < CHAINS * length:
        drawn[random.choices(ascii_uppercase)[0] + str(random.randint(1, 9))] = None
    names, values = list(drawn), _numbers(random, CHAINS)
    needles = []
    for chain, value in enumerate(values):
        own = names[chain * length : (chain + 1) * length]
        start = depth if chain == 0 else random.random()
        places = sorted(random.uniform(start, 1) for _ in range(HOPS))
        needles.append(Needle(f"VAR {own[0]} = {value}.", start))
        for name, source, place in zip(own[1:], own, places, strict=False):
            needles.append(Needle(f"VAR {name} = VAR {source}.", place))
    question = f"Which variables have the value {values[0]}?"
    return Item(tuple(needles), question, tuple(names[:length]), tuple(names[length:]))


TASKS: dict[str, Callable[[Random, float], Item]] = {
    "passkey": passkey,
    "multikey": multikey,
    "variables": variables,
}
"""Task -> its generator, which takes the random stream and the depth."""


@cache
def cities() -> tuple[str, ...]:
    """The keys of numbers."""
    return tuple((Path(__file__).with_name("data") / "cities.txt").read_text("ascii").split())


def _numbers(random: Random, count: int) -> list[str]:
    return [str(10_000 + number) for number in random.sample(range(90_000), count)]


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
        if sentence not in self._sizes:
            self._sizes[sentence] = self._counter.text(" " + sentence)
        return self._sizes[sentence]


def _compose(item: Item, lines: Sequence[str]) -> str:
    body = " ".join(lines or [needle.sentence for needle in item.needles])
    return "\n\n".join((BEFORE, body, item.question))


class TokenCounter:
    """Counts tokens as the model of a folder does."""

    def __init__(self, folder: Path, thinking: bool | None = None) -> None:
        if not folder.is_dir():
            raise ConfigError(f"--tokenizer: {folder} is no folder")
        self.folder = folder
        self._tokenizer = Tokenizer.from_folder(folder)
        self._kwargs: dict[str, Any] = {**reasoning_switch(thinking)}
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
