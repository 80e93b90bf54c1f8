"""Small random pieces from which every kind of document is built."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..tables import GRAMMAR, WORDS, load, words

if TYPE_CHECKING:
    from ..sources import Sources

T = TypeVar("T")
Document = list[tuple[str, str]]
# what follows from the number of a topic
MANY = {"is": "are", "was": "were", "has": "have", "does": "do", "it": "they", "It": "They"}
MANY |= {"them": "them", "s": "", "es": ""}
ONE = {x: x for x in MANY} | {"them": "it"}
COUNTRIES = list(load("countries").countries)
# the first level of GB 2312: rows 16 to 55 of 94 characters, 89 in the last
CHARACTERS = [
    bytes((0xA0 + row, 0xA0 + cell)).decode("gb2312")
    for row in range(16, 56)
    for cell in range(1, 95 if row < 55 else 90)
]


def article(noun: str) -> str:
    """Return the noun with its indefinite article: "a fox", "an owl"."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def upper_first(text: str) -> str:
    """Return the text with a capital first letter, the rest unchanged."""
    return text[:1].upper() + text[1:]


def fix_articles(text: str) -> str:
    """ "a old" -> "an old", wherever a template met a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


class Text(str):
    """A field of a template.

    {x:a} has an article, {x:T} has a capital first letter, and {x:A} has both. {x:C} has no other
    capital. {x:S} is the possessive.
    """

    def __format__(self, form: str) -> str:
        text = article(self) if form in ("a", "A") else str(self)
        if form == "C":
            return text.capitalize()
        if form == "S":
            return text + ("'" if text.endswith("s") else "'s")
        return upper_first(text) if form in ("A", "T") else text


class Fields:
    """The fields of a template. A field that was not given is drawn."""

    def __init__(self, pieces: Pieces, given: dict[str, Any]):
        self.pieces, self.given = pieces, given

    def __getitem__(self, name: str) -> Text:
        return Text(self.given[name] if name in self.given else self.pieces.draw(name))


@dataclass(frozen=True)
class Topic:
    """The subject of a text: its words, its kind (a key of prose.by_kind), its number."""

    text: str
    kind: str = "idea"
    plural: bool = False

    def words(self) -> dict[str, str]:
        """Return fields of essay templates: {t} {T} {is} {has} {was} {does} {it} {them} {s}."""
        fields = {"t": self.text, "T": upper_first(self.text)}
        return fields | (MANY if self.plural else ONE)


class Pieces:
    """A seeded source of random choices, names, words and topics."""

    def __init__(self, seed: int, sources: Sources):
        self.random = random.Random(seed)
        self.sources = sources

    def choice(self, options: Sequence[T]) -> T:
        """Return a random option, all equally likely."""
        return options[int(self.random.random() * len(options))]

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.random.random() < probability

    def between(self, low: int, high: int) -> int:
        """Return an integer, both ends included."""
        return low + int(self.random.random() * (high - low + 1))

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """Return up to `count` different options in random order."""
        return self.random.sample(list(options), min(count, len(options)))

    def ordered(self, options: Sequence[T], count: int) -> list[T]:
        """Return up to `count` options in their own order: greedy text then knows what is next."""
        chosen = self.random.sample(range(len(options)), min(count, len(options)))
        return [options[i] for i in sorted(chosen)]

    def item(self, table: dict[str, T]) -> tuple[str, T]:
        """Return a random entry of a table."""
        return self.choice(list(table.items()))

    def mixed(self, rows: Sequence[Sequence]) -> Any:
        """Return a random row of a mixture of [cumulative share, row] pairs, at any depth."""
        share = self.random.random()
        chosen = next(what for limit, what in rows if share < limit)
        return self.mixed(chosen) if _is_mixture(chosen) else chosen

    def say(self, rule: Any, **given: object) -> str:
        """Return the text of a rule of wording.

        Args:
            rule: a template, whose fields are filled from left to right. A list of templates means
                a random one. A mixture is [[0.4, rule], [1, rule]]. {"draw": fields, "say": rule}
                draws fields before it selects the template.
            given: known fields. Missing ones are drawn (`draw`).
        """
        if _is_mixture(rule):
            rule = self.mixed(rule)
        if isinstance(rule, dict):
            return self.say(rule["say"], **self.fields(rule.get("draw", {}), **given))
        template = rule if isinstance(rule, str) else self.choice(rule)
        return template.format_map(Fields(self, given))

    def fields(self, rules: dict[str, Any], **given: object) -> dict[str, object]:
        """Return fields drawn in order, after those that are given."""
        for name, rule in rules.items():
            given[name] = self.say(rule, **given)
        return given

    def say_all(self, form: dict[str, Any], **given: object) -> list[str]:
        """Return the texts of a form: {"draw": fields, "say": [rule, ...]}, or "any" of lists."""
        fields = self.fields(form.get("draw", {}), **given)
        rules = form["say"] if "say" in form else self.choice(form["any"])
        return [self.say(rule, **fields) for rule in rules]

    def draw(self, name: str) -> str:
        """Return a missing field: an own piece, a rule of grammar.json, a range, a table."""
        if name in DRAWN:
            return DRAWN[name](self)
        if name in GRAMMAR:
            return self.say(GRAMMAR[name])
        if "-" in name:
            low, high = name.split("-")
            return str(self.between(int(low), int(high)))
        return self.choice(list(WORDS[name]))

    def name(self) -> str:
        """Return a first name."""
        return self.choice(words.names)

    def partner(self, name: str) -> str:
        """Return another first name, mostly the same for a name, so that greedy text is right."""
        names = words.names
        i = names.index(name) if name in names else 0
        step = 7 if self.chance(0.6) else self.between(1, len(names) - 1)
        return names[(i + step) % len(names)]

    def word(self) -> str:
        """Return a word of the texts, also a rare one, because copying needs a long list."""
        return self.choice(self.sources.words)

    def sentence(self) -> str:
        """Return a sentence of the tales."""
        return self.choice(self.sources.sentences)

    def phrase(self) -> str:
        """Return two to four neighbouring words of the texts."""
        found = re.sub(r"[^A-Za-z' ]", "", self.sentence()).split()
        start = self.between(0, max(0, len(found) - 4))
        text = " ".join(found[start : start + self.between(2, 4)]).strip("' ")
        return text if len(text) > 3 else self.word()

    def passage(self) -> str:
        """Return two to six neighbouring sentences of the tales, at most 900 characters."""
        start = self.between(0, max(0, len(self.sources.sentences) - 6))
        return " ".join(self.sources.sentences[start : start + self.between(2, 6)])[:900]

    def letters(self) -> str:
        """Return two to eight random letters."""
        return "".join(self.choice(string.ascii_lowercase) for _ in range(self.between(2, 8)))

    def characters(self) -> str:
        """Return one to four of the 3,755 most common Chinese characters."""
        return "".join(self.choice(CHARACTERS) for _ in range(self.between(1, 4)))

    def topic(self) -> Topic:
        """Return something to write about, from tables, single words and phrases of the texts."""
        rule = self.mixed(GRAMMAR["topics"])
        return Topic(self.say(rule), rule["kind"], rule.get("plural", False))


# what a template may draw besides the tables and the rules of grammar.json
DRAWN: dict[str, Callable[[Pieces], str]] = {
    "name": Pieces.name,
    "word": Pieces.word,
    "sentence": Pieces.sentence,
    "passage": Pieces.passage,
    "gib": Pieces.letters,
    "zran": Pieces.characters,
    "caps": lambda p: "".join(p.choice(string.ascii_uppercase) for _ in range(p.between(2, 4))),
    "country": lambda p: p.choice(COUNTRIES),
    "phrase": Pieces.phrase,
    "topic": lambda p: p.topic().text,
    "somewhere": lambda p: p.choice([*WORDS["city"], p.word().capitalize()]),
    "country_or_city": lambda p: p.item(words.capitals)[p.between(0, 1)],
    "language_or_word": lambda p: p.choice([*dict.fromkeys(words.languages.values()), p.word()]),
}


def _is_mixture(rule: Any) -> bool:
    return isinstance(rule, list) and isinstance(rule[0], list)
