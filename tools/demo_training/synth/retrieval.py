"""Long texts with one to four needles, of which one is asked for; lists of pairs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import tables as t
from .pieces import Document, Pieces
from .prose import story

REPEATED = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
    "It was a quiet day in the village. Nothing happened. ",
    "One two three four five six seven. ",
)
INTRODUCTIONS = (
    "",
    "Read the text and answer the question.\n\n",
    "Here is a long text. Find the answer in it.\n\n",
    "There is an important fact hidden in this text.\n\n",
)
SECRETS = ("pass key", "passkey", "secret code", "password", "magic number")


@dataclass(frozen=True)
class Needle:
    """A fact to hide: the sentence, a question for it, the whole answer, the value in it."""

    sentence: str
    question: str
    answer: str
    value: str

    def subject(self) -> str:
        """The answer without its last word: two needles with one subject would be ambiguous."""
        return self.answer.rsplit(" ", 1)[0]


def _secret(p: Pieces) -> Needle:
    value, name = str(p.between(10000, 99999)), p.choice(SECRETS)
    sentence = p.choice(
        [
            "The {w} is {v}. Remember it.",
            "Remember: the {w} is {v}.",
            "Here is something important. The {w} is {v}.",
            "Note that the {w} is {v}. {v} is the {w}.",
        ]
    )
    question = p.choice(
        [
            "What is the {w}?",
            "Tell me the {w}.",
            "What is the {w} in the text above?",
            "Which {w} is given in the text?",
        ]
    )
    return Needle(
        sentence.format(w=name, v=value), question.format(w=name), f"The {name} is {value}.", value
    )


def _number(p: Pieces) -> Needle:
    value, city = str(p.between(10000, 99999)), p.choice(list(t.CAPITALS.values()))
    answer = f"The special number for {city} is {value}."
    question = p.choice(
        ["What is the special number for {c}?", "Give me the special number for {c}."]
    )
    return Needle(answer, question.format(c=city), answer, value)


def _food(p: Pieces) -> Needle:
    name, food = p.name(), p.choice(t.FOODS + t.CATEGORIES["fruit"])
    return Needle(
        f"{name} told everyone that the best food is {food}.",
        f"What is the best food for {name}?",
        f"The best food for {name} is {food}.",
        food,
    )


def _hidden(p: Pieces) -> Needle:
    name, thing, place = p.name(), p.choice(t.OBJECTS), p.choice(t.PLACES)
    return Needle(
        f"{name} has hidden the {thing} in the {place}.",
        f"Where did {name} hide the {thing}?",
        f"{name} hid the {thing} in the {place}.",
        place,
    )


def _door(p: Pieces) -> Needle:
    key, door = p.word(), p.word()
    answer = f"The key {key} opens the door {door}."
    return Needle(answer, f"Which door does the key {key} open?", answer, door)


def _everyday(p: Pieces) -> Needle:
    """Facts as they stand in ordinary texts; for training only, the evaluation asks the others."""
    name, other = p.name(), p.name()
    number = str(p.between(100000, 999999))
    hour, place, word = p.between(1, 12), p.choice(t.PLACES), p.word()
    return p.choice(
        [
            Needle(
                f"The phone number of {name} is {number}.",
                f"What is the phone number of {name}?",
                f"The phone number of {name} is {number}.",
                number,
            ),
            Needle(
                f"The meeting with {name} is at {hour} o'clock.",
                f"When is the meeting with {name}?",
                f"The meeting with {name} is at {hour} o'clock.",
                f"{hour} o'clock",
            ),
            Needle(
                f"{name} met {other} at the {place}.",
                f"Where did {name} meet {other}?",
                f"{name} met {other} at the {place}.",
                place,
            ),
            Needle(
                f"The secret word of {name} is {word}.",
                f"What is the secret word of {name}?",
                f"The secret word of {name} is {word}.",
                word,
            ),
        ]
    )


NEEDLES = (_secret, _secret, _number, _food, _hidden, _door)


def needle(p: Pieces, everyday: float = 0.25) -> Needle:
    """A fact to hide; `everyday` is the share of the kinds outside the evaluation."""
    return _everyday(p) if p.chance(everyday) else p.choice(NEEDLES)(p)


def haystack(p: Pieces, characters: int) -> list[str]:
    """Sentences of about this many characters: repeated, a passage, stories or a mixture."""
    r = p.random.random()
    if r < 0.25:
        text = p.choice(REPEATED)
        return [text.strip()] * max(1, characters // len(text))
    if r < 0.6:
        source = p.choice([p.sources.tales, p.sources.play])
        start = p.between(0, max(0, len(source) - characters - 1))
        passage = source[start : start + characters]
        return [x for x in re.split(r"(?<=[.!?:])\s+", passage) if x] or [passage]
    found: list[str] = []
    length = 0
    while length < characters:
        lines = story(p) if r < 0.85 else [p.choice(p.sources.sentences)]
        found += lines
        length += sum(map(len, lines)) + len(lines)
    return found


def retrieval(
    p: Pieces, characters: int, needles: int | None = None, everyday: float = 0.25
) -> tuple[Document, str]:
    """One long user text with needles, a question, and the answer; also the value that answers it.

    Args:
        characters: length of the haystack, characters.
        needles: how many facts are hidden (same subjects are dropped); random 1 to 4 if None.
        everyday: share of needle kinds which the evaluation does not use.
    """
    count = needles or p.choice([1, 1, 2, 3, 4])
    lines = haystack(p, max(60, characters))
    by_subject: dict[str, Needle] = {}
    for _ in range(count):
        found = needle(p, everyday)
        by_subject.setdefault(found.subject(), found)
    hidden = list(by_subject.values())
    for x in hidden:
        lines.insert(p.between(0, len(lines)), x.sentence)
    asked = p.choice(hidden)
    text = p.choice([" ", "\n"]).join(lines)
    request = f"{p.choice(INTRODUCTIONS)}{text}\n\n{asked.question}"
    return [("user", request), ("assistant", asked.answer)], asked.value


def key_values(p: Pieces, count: int) -> Document:
    """A list of up to `count` pairs, and the value of one key."""
    keys = list(dict.fromkeys(p.word() for _ in range(count)))
    values = [p.word() if p.chance(0.5) else str(p.between(100, 9999)) for _ in keys]
    separator, i = p.choice([": ", " = ", " -> "]), p.between(0, len(keys) - 1)
    lines = "\n".join(k + separator + v for k, v in zip(keys, values, strict=True))
    start = p.choice(["Here is a list.\n", "Look at these pairs.\n", ""])
    ask = p.choice(["What is the value of {k}?", "Which value belongs to {k}?", "{k}?"])
    answer = (
        p.choice(["{v}", "The value of {k} is {v}."])
        if ask == "{k}?"
        else "The value of {k} is {v}."
    )
    return [
        ("user", start + lines + "\n" + ask.format(k=keys[i])),
        ("assistant", answer.format(k=keys[i], v=values[i])),
    ]
