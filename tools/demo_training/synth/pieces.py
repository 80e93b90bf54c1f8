"""Small random pieces from which every kind of document is built."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from . import tables as t
from .trivia import DEFINITIONS

if TYPE_CHECKING:
    from ..sources import Sources

T = TypeVar("T")
Document = list[tuple[str, str]]


def article(noun: str) -> str:
    """The noun with its indefinite article: "a fox", "an owl"."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def upper_first(text: str) -> str:
    """The text with a capital first letter, the rest unchanged."""
    return text[:1].upper() + text[1:]


def fix_articles(text: str) -> str:
    """ "a old" -> "an old", wherever a template met a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


@dataclass(frozen=True)
class Topic:
    """What a text is about: its words, its kind (a key of BY_KIND), its number."""

    text: str
    kind: str = "idea"
    plural: bool = False

    def words(self) -> dict[str, str]:
        """Fields of the essay templates: {t} {T} {is} {has} {was} {does} {it} {them} {s}."""
        few = self.plural
        return {
            "t": self.text,
            "T": upper_first(self.text),
            "is": "are" if few else "is",
            "was": "were" if few else "was",
            "has": "have" if few else "has",
            "does": "do" if few else "does",
            "it": "they" if few else "it",
            "It": "They" if few else "It",
            "them": "them" if few else "it",
            "s": "" if few else "s",
        }


class Pieces:
    """A seeded source of random choices, names, words and topics."""

    def __init__(self, seed: int, sources: Sources):
        self.random = random.Random(seed)
        self.sources = sources

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[int(self.random.random() * len(options))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random.random() < probability

    def between(self, low: int, high: int) -> int:
        """An integer, both ends included."""
        return low + int(self.random.random() * (high - low + 1))

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """Up to `count` different options in random order."""
        return self.random.sample(list(options), min(count, len(options)))

    def ordered(self, options: Sequence[T], count: int) -> list[T]:
        """Up to `count` options in their own order: greedy text then knows what is next."""
        chosen = self.random.sample(range(len(options)), min(count, len(options)))
        return [options[i] for i in sorted(chosen)]

    def item(self, table: dict[str, T]) -> tuple[str, T]:
        """One entry of a table."""
        return self.choice(list(table.items()))

    def name(self) -> str:
        """A first name."""
        return self.choice(t.NAMES)

    def partner(self, name: str) -> str:
        """Another first name; mostly the same for a name, so that greedy text keeps them apart."""
        i = t.NAMES.index(name) if name in t.NAMES else 0
        step = 7 if self.chance(0.6) else self.between(1, len(t.NAMES) - 1)
        return t.NAMES[(i + step) % len(t.NAMES)]

    def word(self) -> str:
        """A word of the texts, rare ones included: copying must not depend on a short list."""
        return self.choice(self.sources.words)

    def being(self) -> str:
        """An animal, a person, or a random noun in that place."""
        r = self.random.random()
        if r < 0.4:
            return self.choice(list(t.ANIMALS))
        return self.choice(t.BEINGS) if r < 0.7 else self.word()

    def goal(self) -> str:
        """What somebody wants, as an infinitive without "to"."""
        r = self.random.random()
        if r < 0.4:
            return "be " + article(self.choice(t.JOBS))
        if r < 0.7:
            return self.choice(t.GOALS)
        if r < 0.85:
            return "find the " + self.word()
        return "be " + article(self.word())

    def phrase(self) -> str:
        """Two to four neighbouring words of the texts."""
        words = re.sub(r"[^A-Za-z' ]", "", self.choice(self.sources.sentences)).split()
        start = self.between(0, max(0, len(words) - 4))
        found = " ".join(words[start : start + self.between(2, 4)]).strip("' ")
        return found if len(found) > 3 else self.word()

    def topic(self) -> Topic:
        """Something to write about, from tables, single words and phrases of the texts."""
        r, choice = self.random.random(), self.choice
        if r < 0.15:
            return Topic(self.phrase())
        if r < 0.25:
            return self._place()
        if r < 0.33:
            return Topic(article(choice(t.ADJECTIVES) + " " + choice(list(t.ANIMALS))), "being")
        if r < 0.40:
            return Topic(choice(["the ", "my ", "a young "]) + self.being(), "being")
        if r < 0.47:
            return Topic(choice(t.PLURAL_TOPICS), "thing", plural=True)
        if r < 0.57:
            if self.chance(0.4):
                return Topic(choice(t.NATURE), "nature")
            return Topic(choice(t.SINGLE_TOPICS), "idea")
        if r < 0.64:
            return self._thing()
        if r < 0.74:
            return self._activity()
        return self._words()

    def _place(self) -> Topic:
        r = self.random.random()
        if r < 0.35:
            return Topic(self.item(t.CAPITALS)[self.between(0, 1)], "place")
        place = self.choice(t.PLACES)
        if r < 0.75:
            return Topic(self.choice(["the ", "my ", "our "]) + place, "place")
        return Topic(
            self.name() + "'s " + place if r < 0.85 else f"my {self.word()}'s {place}", "place"
        )

    def _thing(self) -> Topic:
        r = self.random.random()
        if r < 0.4:
            return Topic(self.choice(["a ", "the ", "my "]) + self.choice(t.OBJECTS), "thing")
        if r < 0.7:
            noun = self.choice(list(DEFINITIONS))
            return Topic(self.choice(["the ", "my "]) + noun, "thing")
        return Topic(f"{self.name()}'s {self.word()}", "thing")

    def _activity(self) -> Topic:
        r, words = self.random.random(), self.word
        if r < 0.25:
            return Topic(
                "learning " + self.choice([*set_order(t.LANGUAGES.values()), words()]), "activity"
            )
        if r < 0.5:
            return Topic(
                self.choice(["working with ", "playing with ", "living with "]) + words(),
                "activity",
            )
        if r < 0.75:
            return Topic("travelling to " + self._place().text, "activity")
        return Topic(
            self.choice(["the beginnings of ", "the future of ", "the joy of "]) + words(), "idea"
        )

    def _words(self) -> Topic:
        r, word = self.random.random(), self.word
        if r < 0.2:
            return Topic(f"{word()} and {word()}", plural=True)
        if r < 0.5:
            start = self.choice(["the ", "my ", "our ", "your "])
            return Topic(start + word() + self.choice([" ", " of the ", " in the "]) + word())
        if r < 0.6:
            return Topic(
                f"the {word()} that {self.choice(['likes', 'wants', 'knows', 'has'])} {word()}"
            )
        return Topic(word() if r < 0.85 else f"{word()} {word()}")


def set_order(values) -> list[str]:
    """The different values in the order of their first appearance."""
    return list(dict.fromkeys(values))
