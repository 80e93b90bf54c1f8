"""What is hidden and asked: pass key, numbers with keys, chains of variables, a sum.

Everything is drawn from a `random.Random`, so the same seed hides the same things. No hidden string
stands in the haystack, and none is part of another.

Source of the tasks: RULER, arXiv 2404.06654; the words are those of `wordings`.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from fd_dsa.accuracy.retrieval.wordings import Wording
from fd_dsa.errors import ConfigError


@dataclass(frozen=True)
class Needle:
    """A sentence to hide.

    Attributes:
        sentence: as it stands in the text.
        depth: share of the haystack's tokens before it, 0 to 1.
    """

    sentence: str
    depth: float


@dataclass(frozen=True)
class Item:
    """One question and what is hidden for it.

    Attributes:
        before: what is said before the text.
        needles: of equal depth in the order in which they stand.
        question: asked after the text.
        references: the strings that a right answer names.
        others: hidden strings of the same kind, which a right answer does not name.
    """

    before: str
    needles: tuple[Needle, ...]
    question: str
    references: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class TaskSizes:
    """How much is hidden.

    Attributes:
        keys: numbers with keys, the one that is asked for included.
        chains: chains of variables, the one that is asked for included.
        hops: statements of a chain after its first.
    """

    keys: int = 4
    chains: int = 2
    hops: int = 3


def passkey(random: Random, depth: float, wording: Wording, sizes: TaskSizes) -> Item:
    """One number at `depth`."""
    (value,) = _numbers(random, 1, wording.digits)
    needle = Needle(wording.passkey_needle.format(value=value), depth)
    return Item(wording.passkey_before, (needle,), wording.passkey_question, (value,), ())


def multikey(random: Random, depth: float, wording: Wording, sizes: TaskSizes) -> Item:
    """Numbers with keys anywhere; the one that is asked for at `depth`."""
    keys = random.sample(wording.keys, sizes.keys)
    values = _numbers(random, sizes.keys, wording.digits)
    needles = tuple(
        Needle(
            wording.multikey_needle.format(key=key, value=value),
            depth if number == 0 else random.random(),
        )
        for number, (key, value) in enumerate(zip(keys, values, strict=True))
    )
    question = wording.multikey_question.format(key=keys[0])
    return Item(wording.multikey_before, needles, question, (values[0],), tuple(values[1:]))


def variables(random: Random, depth: float, wording: Wording, sizes: TaskSizes) -> Item:
    """Chains of assignments; the one that is asked for begins at `depth`, the rest lies behind.

    The statements of a chain stand in order, those of different chains may lie between.
    """
    length = sizes.hops + 1
    names = _names(random, sizes.chains * length, wording)
    values = _numbers(random, sizes.chains, wording.digits)
    needles = []
    for chain, value in enumerate(values):
        own = names[chain * length : (chain + 1) * length]
        start = depth if chain == 0 else random.random()
        places = sorted(random.uniform(start, 1) for _ in range(sizes.hops))
        needles.append(Needle(wording.variables_first.format(name=own[0], value=value), start))
        for name, source, place in zip(own[1:], own, places, strict=False):
            sentence = wording.variables_next.format(name=name, source=source)
            needles.append(Needle(sentence, place))
    question = wording.variables_question.format(value=values[0])
    references, others = tuple(names[:length]), tuple(names[length:])
    return Item(wording.variables_before, tuple(needles), question, references, others)


def arithmetic(random: Random, depth: float, wording: Wording, sizes: TaskSizes) -> Item:
    """A sum after a text that says nothing of it: is the model coherent at this length at all?"""
    while True:
        first, second = random.randint(2, 49), random.randint(2, 49)
        plus = random.random() < 0.5
        result = first + second if plus else first - second
        if result > 0 and result not in (first, second):
            break
    question = wording.arithmetic_question.format(sum=f"{first} {'+' if plus else '-'} {second}")
    return Item(wording.arithmetic_before, (), question, (str(result),), ())


Task = Callable[[Random, float, Wording, TaskSizes], Item]

TASKS: dict[str, Task] = {
    "passkey": passkey,
    "multikey": multikey,
    "variables": variables,
    "arithmetic": arithmetic,
}
"""Task -> its generator, which takes the random stream, depth, wording and sizes."""

TITLES = {
    "passkey": "pass key",
    "multikey": "multi-key needle",
    "variables": "variable tracking",
    "arithmetic": "sum after the text",
}


def check_sizes(sizes: TaskSizes, wording: Wording) -> None:
    """Refuse sizes for which a wording has no distinct keys or names.

    Raises:
        ConfigError: a size is out of its range.
    """
    num_names = 26**wording.letters * (9 if wording.number_names else 1)
    _check_size("keys", sizes.keys, len(wording.keys), wording)
    _check_size("hops", sizes.hops, num_names // 2 - 1, wording)
    _check_size("chains", sizes.chains, num_names // (2 * (sizes.hops + 1)), wording)


def _check_size(name: str, value: int, most: int, wording: Wording) -> None:
    """One size against its limit."""
    if not 1 <= value <= most:
        raise ConfigError(
            f"--{name}: got {value}; allowed 1 to {most} in the wording {wording.name!r}"
        )


def _numbers(random: Random, count: int, digits: int) -> list[str]:
    """Distinct numbers of that many digits."""
    low = 10 ** (digits - 1)
    return [str(low + number) for number in random.sample(range(9 * low), count)]


def _names(random: Random, count: int, wording: Wording) -> list[str]:
    """Distinct names of variables."""
    found: dict[str, None] = {}
    while len(found) < count:
        name = "".join(random.choices(string.ascii_uppercase, k=wording.letters))
        found[name + (str(random.randint(1, 9)) if wording.number_names else "")] = None
    return list(found)
