"""The text that things are hidden in: sentences of old tales, carried in the package."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from random import Random


@cache
def sentences() -> tuple[str, ...]:
    """Sentences of public-domain tales in their order (`data/ORIGIN.md`); ASCII, no digit."""
    file = files("fd_dsa.accuracy.retrieval") / "data" / "haystack.txt"
    return tuple(file.read_text("utf-8").splitlines())


def endless(random: Random) -> Iterator[str]:
    """The sentences from a random one on, again from the first after the last, without end."""
    text = sentences()
    place = random.randrange(len(text))
    while True:
        yield text[place]
        place = (place + 1) % len(text)
