"""The prompts that the chat page proposes are among those that the demo model is trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import pytest
from demo_training.heldout import is_held_out
from demo_training.synth import Generator
from demo_training.tables import load, words

from tests.serve.test_page_texts import texts

PROMPTS = [pair for key, pair in texts().items() if re.fullmatch(r"example\d+", key)]


def in_english(generator: Generator) -> Iterator[str]:
    """Every wording of the kinds on the page: about the model, facts, capitals, poems."""
    say, about, world = generator.pieces.say, load("about"), load("countries")
    for row in (*about.greetings, *about.identity, *about.topics):
        yield from row["ask"]
    for stems in words.general:
        yield from stems.split("|")
    for rule, name in product(world.capital, world.countries):
        yield say(rule, a=name)
    for rule, topic in product(load("prose").type_requests, words.nature):
        yield say(rule, y="poem", t=topic)


def in_chinese(generator: Generator) -> Iterator[str]:
    """Yield the Chinese prompts, sums among them, each with and without a question mark."""
    say, chinese = generator.pieces.say, load("chinese")
    asks = [ask for row in chinese.known for ask in row["ask"]]
    asks += [say(x, a=a) for x, a in product(chinese.capital, load("countries").chinese)]
    sums = product(chinese.arithmetic["plus"], range(21), range(21))
    asks += [say(rule, a=a, b=b) for rule, a, b in sums]
    for ask in asks:
        yield from (ask, f"{ask}？")


@pytest.mark.parametrize(("language", "wordings"), [(0, in_english), (1, in_chinese)])
def test_the_model_is_trained_on_the_prompts_of_the_page(generator, language, wordings) -> None:
    prompts = {pair[language] for pair in PROMPTS}
    assert len(prompts) == 4
    assert prompts - set(wordings(generator)) == set()
    assert not any(map(is_held_out, prompts))
