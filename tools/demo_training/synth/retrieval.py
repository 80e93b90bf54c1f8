"""Long texts with one to four needles and a question for one, and lists of pairs."""

from __future__ import annotations

import re

from .pieces import Document, Pieces
from .prose import story
from .reading import texts


def haystack(p: Pieces, characters: int) -> list[str]:
    """Return sentences of about this many characters: repeated, a passage, stories or a mixture."""
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


def retrieval(p: Pieces, characters: int) -> Document:
    """Return a long text with one to four needles, a question for one, and its answer.

    Args:
        characters: length of the haystack, characters.
    """
    count = p.choice([1, 1, 2, 3, 4])
    lines = haystack(p, max(60, characters))
    hidden: dict[str, list[str]] = {}
    for _ in range(count):
        # a quarter are of the kinds outside the evaluation
        found = p.say_all(texts.everyday if p.chance(0.25) else p.choice(texts.needles))
        # two needles with one answer but for its last word would be ambiguous
        hidden.setdefault(found[2].rsplit(" ", 1)[0], found)
    for sentence, *_ in hidden.values():
        lines.insert(p.between(0, len(lines)), sentence)
    _, question, answer, _ = p.choice(list(hidden.values()))
    text = p.choice([" ", "\n"]).join(lines)
    request = f"{p.choice(texts.introductions)}{text}\n\n{question}"
    return [("user", request), ("assistant", answer)]


def key_values(p: Pieces, count: int) -> Document:
    """Return a list of up to `count` pairs, and the value of one key."""
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
