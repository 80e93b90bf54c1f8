"""What is hidden and asked: pass key, numbers with keys, chains of variables.

Everything is drawn from a `random.Random`, so the same seed hides the same things. No hidden string
is in the haystack, and none is part of another. The words are those of a reader who asks for facts,
as the demo model was trained to be asked.

Source of the tasks: RULER, arXiv 2404.06654; pass keys: Mohtashami and Jaggi, arXiv 2305.16300.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from string import ascii_uppercase

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
        question: asked after the text.
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
    """Distinct numbers of five digits."""
    return [str(10_000 + number) for number in random.sample(range(90_000), count)]
