"""Conversation: greetings, questions about the model, advice, problems, "I do not know"."""

from __future__ import annotations

from ..tables import load, words
from .pieces import Document, Pieces

talk = load("talk")


def advice_request(p: Pieces) -> tuple[str, list[str]]:
    """Return (request, tips) for a task of the table, any activity, or a trip."""
    if p.chance(0.2):
        capitals = words.capitals
        place = p.choice([*capitals.values(), *capitals, p.word().capitalize()])
        tips = [s.format(p=place) for s in p.ordered(talk.trip_tips, p.between(3, 5))]
        return p.say(talk.trip_requests, p=place), tips
    key, tips = how_to(p)
    return p.say(talk.how_to_requests, k=key), p.ordered(tips, p.between(3, 5))


def how_to(p: Pieces) -> tuple[str, list[str]]:
    """Return (activity, tips) for "how to {activity}"."""
    if p.chance(0.55):
        return p.item(talk.tips)
    key = p.say([[0.3, "{goals}"], [1, "{how_to}"]])
    return key, [s.format(k=key) for s in talk.any_tips]


def problem(p: Pieces) -> tuple[str, str]:
    """Return (a problem of everyday life, advice that names it)."""
    kind = p.mixed([[0.3, "feeling"], [0.55, "ill"], [0.78, "broken"], [1, "lost"]])
    if kind == "feeling":
        feeling, answer = p.item(talk.feelings)
        return p.say(talk.feeling_requests, f=feeling), answer
    thing = p.choice(list(words.animals) if kind == "ill" else [*words.things, p.word()])
    form = talk.problems[kind]
    return p.say(form["says"], x=thing) + p.choice(talk.problem_ends), p.say(
        form["advice"], x=thing
    )


def one_of_stems(p: Pieces, table: dict[str, str]) -> tuple[str, str]:
    """Return (one wording of a question, its answer) of a table with "wording|wording" keys."""
    stems, answer = p.item(table)
    return p.choice(stems.split("|")), answer


def persona(p: Pieces) -> tuple[str, str]:
    """Return questions about the model, greetings, jokes."""
    r = p.random.random()
    if r < 0.85:
        return one_of_stems(p, talk.persona if r < 0.5 else talk.greetings)
    if r < 0.94:
        return p.choice(talk.joke_requests), p.choice(talk.jokes)
    return p.choice(talk.fun_fact_requests), p.choice(talk.fun_facts)


def unknown(p: Pieces) -> tuple[str, str]:
    """Return (a question outside the tables, an honest answer that repeats what is not known)."""
    question, answer = p.say_all(talk.unknown)
    return question, answer


def names_chat(p: Pieces, middle: Document) -> Document:
    """Return a chat in which somebody tells one or two things, and asks for one of them later."""
    fields = p.fields(talk.memory)
    facts = [p.choice(talk.own_name), *talk.told]
    told = [[p.say(x, **fields) for x in fact] for fact in p.sample(facts, p.between(1, 2))]
    _, _, question, answer = p.choice(told)
    start = [turn for says, reply, *_ in told for turn in (("user", says), ("assistant", reply))]
    return [*start, *middle, ("user", question), ("assistant", answer)]
