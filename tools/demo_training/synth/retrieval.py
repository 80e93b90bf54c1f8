"""Long texts with one to four needles, of which one is asked for; lists of pairs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .pieces import Document, Pieces
from .prose import story
from .reading import texts


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


def needle(p: Pieces, everyday: float = 0.25) -> Needle:
    """A fact to hide; `everyday` is the share of the kinds outside the evaluation."""
    form = texts.everyday if p.chance(everyday) else p.choice(texts.needles)
    return Needle(*p.say_all(form))


def haystack(p: Pieces, characters: int) -> list[str]:
    """Sentences of about this many characters: repeated, a passage, stories or a mixture."""
    r = p.random.random()
    if r < 0.25:
        text = p.choice(texts.repeated)
        return [text.strip()] * max(1, characters // len(text))
    if r < 0.6:
        source = p.choice([p.sources.tales, p.sources.play])
        start = p.between(0, max(0, len(source) - characters - 1))
        passage = source[start : start + characters]
        return [x for x in re.split(r"(?<=[.!?:])\s+", passage) if x] or [passage]
    found: list[str] = []
    length = 0
    while length < characters:
        lines = story(p) if r < 0.85 else [p.sentence()]
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
    request = f"{p.choice(texts.introductions)}{text}\n\n{asked.question}"
    return [("user", request), ("assistant", asked.answer)], asked.value


def key_values(p: Pieces, count: int) -> Document:
    """A list of up to `count` pairs, and the value of one key."""
    keys = list(dict.fromkeys(p.word() for _ in range(count)))
    values = [p.word() if p.chance(0.5) else str(p.between(100, 9999)) for _ in keys]
    separator, i = p.choice([": ", " = ", " -> "]), p.between(0, len(keys) - 1)
    lines = "\n".join(k + separator + v for k, v in zip(keys, values, strict=True))
    start, ask = p.choice(texts.pair_starts), p.choice(texts.pair_asks)
    whole = "The value of {k} is {v}."
    answer = p.choice(["{v}", whole]) if ask == "{k}?" else whole
    return [
        ("user", start + lines + "\n" + ask.format(k=keys[i])),
        ("assistant", answer.format(k=keys[i], v=values[i])),
    ]
