"""Greetings, questions about the model and its field, and countries: closed lists of answers."""

from __future__ import annotations

from ..tables import load
from .pieces import Pieces

about = load("about")
world = load("countries")


def entry(p: Pieces, rows: list[dict]) -> tuple[str, str]:
    """Return (question, answer) of one row {"ask": wordings, "answer": text}."""
    row = p.choice(rows)
    return p.say(row["ask"]), row["answer"]


def introduction(p: Pieces) -> tuple[str, str]:
    """Return a greeting, or a question about the model, its abilities or its field."""
    return entry(
        p, getattr(about, p.mixed([[0.3, "greetings"], [0.65, "identity"], [1, "topics"]]))
    )


def country(p: Pieces) -> tuple[str, str]:
    """Return a question about the capital or the continent of a country, or of something else."""
    name, (capital, continent) = p.item(world.countries)
    r = p.random.random()
    if r < 0.62:
        return p.say(world.capital, a=name), f"The capital of {name} is {capital}."
    if r < 0.74:
        place = p.choice(world.nowhere) if p.chance(0.5) else p.draw("place_name")
        if place in world.countries:
            place = world.nowhere[0]
        return p.say(world.capital, a=place), f"I am sorry, I do not know the capital of {place}."
    if r < 0.88:
        answer = f"{name[0].upper()}{name[1:]} is in {continent}."
        if p.chance(0.7):
            return p.say(world.continent, a=name), answer
        guess = continent if p.chance(0.5) else p.choice(world.continents)
        start = "Yes" if guess == continent else "No"
        return p.say(world.belongs, a=name, c=guess), f"{start}, {name} is in {continent}."
    return _named_capital(p, name, capital)


def _named_capital(p: Pieces, name: str, capital: str) -> tuple[str, str]:
    """Return a question that names a capital."""
    if p.chance(0.4):
        guess = capital if p.chance(0.5) else p.choice([*world.cities, p.draw("city")])
        start = "Yes" if guess == capital else "No"
        answer = f"{start}, the capital of {name} is {capital}."
        return p.say(world.yes, a=name, b=guess), answer
    while name in world.aliases:
        name, (capital, _) = p.item(world.countries)
    return p.say(world.back, b=capital), f"{capital} is the capital of {name}."
