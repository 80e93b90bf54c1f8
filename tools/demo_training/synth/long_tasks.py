"""Tasks on long texts beside plain needles: many keys, chains of variables, a question after it."""

from __future__ import annotations

from itertools import pairwise

from ..tables import words
from .instructions import choose
from .pieces import Document, Pieces
from .questions import arithmetic, fact
from .reading import texts
from .retrieval import haystack
from .talk import persona


def with_lines(p: Pieces, characters: int, lines: list[str], question: str) -> str:
    """Return a text of about this many characters with lines in order, and a question."""
    text = haystack(p, max(60, characters)) if characters > 30 else []
    places = sorted(p.between(0, len(text)) for _ in lines)
    for place, line in reversed(list(zip(places, lines, strict=True))):  # keeps their order
        text.insert(place, line)
    body = p.choice([" ", " ", "\n"]).join(text)
    return "\n\n".join(x for x in (p.choice(texts.task_introductions), body, question) if x)


def _keys(p: Pieces, count: int) -> list[str]:
    """Return different names of cities, words, or pairs of words."""
    r = p.random.random()
    if r < 0.5:
        return p.sample([x for x in words.capitals.values() if " " not in x], count)
    drawn = [p.word() if r < 0.75 else f"{p.word()}-{p.word()}" for _ in range(count)]
    return list(dict.fromkeys(drawn))


def _value(p: Pieces, digits: int) -> str:
    return str(p.between(10 ** (digits - 1), 10**digits - 1))


def many_keys(p: Pieces, characters: int) -> Document:
    """Return two to 32 facts of one form, one of them asked for."""
    keys = _keys(p, p.choice([2, 3, 4, 4, 4, 6, 8, 12, 16, 24, 32]))
    says, asks = p.choice(texts.key_forms)
    digits = p.choice([5, 5, 5, 7])
    values = [_value(p, digits) for _ in keys]
    lines = [says.format(k=k, v=v) for k, v in zip(keys, values, strict=True)]
    i = p.between(0, len(keys) - 1)
    name = next(n for n in texts.key_answers if n in says)
    answer = texts.key_answers[name].format(k=keys[i], v=values[i])
    question = asks.format(k=keys[i])
    return [("user", with_lines(p, characters, lines, question)), ("assistant", answer)]


def _names(p: Pieces, count: int, long: bool) -> list[str]:
    """Return different names of variables: a letter and a digit, or five letters."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    found: dict[str, None] = {}
    while len(found) < count:
        name = "".join(p.choice(letters) for _ in range(5 if long else 1))
        found[name if long else name + str(p.between(1, 9))] = None
    return list(found)


def variables(p: Pieces, characters: int) -> Document:
    """Ask for the variables of one or two values in chains, in the order of their chain.

    A second question about the same chains costs few tokens, and chains are learned late.
    """
    chains, hops = p.choice([1, 1, 2, 2, 2, 3, 4]), p.choice([1, 2, 3, 3, 3, 4, 5, 6])
    long_names, size = p.chance(0.1), hops + 1
    names = _names(p, chains * size, long_names)
    groups = [names[i * size : (i + 1) * size] for i in range(chains)]
    values = list(dict.fromkeys(_value(p, 5) for _ in range(chains + 5)))[:chains]
    waiting = [
        [f"VAR {g[0]} = {v}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(g))]
        for g, v in zip(groups, values, strict=True)
    ]
    lines: list[str] = []
    while any(waiting):
        lines.append(p.choice([w for w in waiting if w]).pop(0))
    asked = p.sample(range(chains), p.between(1, min(chains, 2)))
    turns: Document = []
    for i in asked:
        question = p.say(texts.variable_asks, v=values[i])
        request = question if turns else with_lines(p, characters, lines, question)
        turns += [("user", request), ("assistant", f"The variables are {', '.join(groups[i])}.")]
    return turns


def question_after(p: Pieces, characters: int) -> Document:
    """Return a short question that has nothing to do with the long text above it."""
    r = p.random.random()
    if r < 0.55:
        question, answer = arithmetic(p)
    elif r < 0.85:
        question, answer = fact(p)
    elif r < 0.93:
        question, answer = persona(p)
    else:
        question, answer, _ = choose(p)
    return [("user", with_lines(p, characters, [], question)), ("assistant", answer)]


def long_task(p: Pieces, characters: int) -> Document:
    """Return any of these tasks."""
    r = p.random.random()
    if r < 0.35:
        return many_keys(p, characters)
    return variables(p, characters) if r < 0.78 else question_after(p, characters)
