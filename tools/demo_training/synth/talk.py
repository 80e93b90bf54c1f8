"""Conversation: greetings, questions about the model, advice, problems, "I do not know"."""

from __future__ import annotations

from . import tables as t
from . import talk_tables as tt
from .pieces import Document, Pieces, article

HOW_TO_REQUESTS = [
    "Give me advice on how to {k}.",
    "How can I {k}?",
    "How do I {k}?",
    "What should I do to {k}?",
    "Write some tips to {k}.",
    "Give me some tips on how to {k}.",
    "I want to {k}. What should I do?",
    "Can you help me {k}?",
    "What is the best way to {k}?",
    "Explain how to {k}.",
]
TRIP_REQUESTS = [
    "Can you help me plan a trip to {p}?",
    "Plan a trip to {p} for me.",
    "I want to travel to {p}. What should I do?",
    "I am going to {p} next month. Do you have any tips?",
    "What should I do in {p}?",
    "Help me plan a holiday in {p}.",
]


def advice_request(p: Pieces) -> tuple[str, list[str]]:
    """(request, tips) on how to do something, from the table or for any activity, or for a trip."""
    r = p.random.random()
    if r < 0.2:
        place = p.choice([*t.CAPITALS.values(), *t.CAPITALS, p.word().capitalize()])
        tips = [s.format(p=place) for s in p.ordered(tt.TRIP_TIPS, p.between(3, 5))]
        return p.choice(TRIP_REQUESTS).format(p=place), tips
    key, tips = how_to(p)
    return p.choice(HOW_TO_REQUESTS).format(k=key), p.ordered(tips, p.between(3, 5))


def how_to(p: Pieces) -> tuple[str, list[str]]:
    """(activity, tips) for "how to {activity}"."""
    if p.chance(0.55):
        return p.item(tt.TIPS)
    if p.chance(0.3):
        key = p.choice(t.GOALS)
    else:
        key = p.choice(tt.VERBS) + p.choice([" a ", " the ", " my ", " "]) + p.word()
    return key, [s.format(k=key) for s in tt.ANY_TIPS]


def problem(p: Pieces) -> tuple[str, str]:
    """(a problem of everyday life, advice that names it)."""
    r = p.random.random()
    if r < 0.3:
        feeling, answer = p.item(tt.FEELINGS)
        request = p.choice(
            ["I am {f}.", "I feel {f}.", "I am so {f} today.", "I'm {f}", "i feel {f}"]
        )
        return request.format(f=feeling), answer
    if r < 0.55:
        thing, templates = p.choice(list(t.ANIMALS)), tt.ILL
        request = p.choice(["My {x} is ill.", "My {x} is sick.", "My {x} does not want to eat."])
    elif r < 0.78:
        thing, templates = p.choice([*t.THINGS, p.word()]), tt.BROKEN
        request = p.choice(["My {x} is broken.", "My {x} does not work.", "I broke my {x}."])
    else:
        thing, templates = p.choice([*t.THINGS, p.word()]), tt.LOST
        request = p.choice(["I lost my {x}.", "I cannot find my {x}.", "My {x} is gone."])
    request += p.choice(
        [" What should I do?", " What can I do?", " Can you help me?", " Any advice?"]
    )
    return request.format(x=thing), " ".join(s.format(x=thing) for s in templates)


def _stem(p: Pieces, table: dict[str, str]) -> tuple[str, str]:
    """(one wording of a question, its answer) of a table with "wording|wording" keys."""
    stems, answer = p.item(table)
    return p.choice(stems.split("|")), answer


def persona(p: Pieces) -> tuple[str, str]:
    """Questions about the model, greetings, jokes."""
    r = p.random.random()
    if r < 0.5:
        return _stem(p, tt.PERSONA)
    if r < 0.85:
        return _stem(p, tt.GREETINGS)
    if r < 0.94:
        request = p.choice(
            ["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Tell a joke"]
        )
        return request, p.choice(tt.JOKES)
    return p.choice(["Tell me a fun fact.", "Do you know a fun fact?"]), p.choice(tt.FUN_FACTS)


def unknown(p: Pieces) -> tuple[str, str]:
    """(a question outside the tables, an honest answer that repeats what is not known)."""
    word, number = p.word, p.between
    person = f"{p.name()} {word().capitalize()}"
    place, other = (p.choice([*t.CAPITALS.values(), word().capitalize()]) for _ in range(2))
    verb = p.choice(["made", "found", "invented", "built"])
    thing, made_up, year = f"{word()} {word()}", word() + word(), number(1200, 2025)
    question, what = p.choice(
        [
            (f"Who was {person}?", f"who {person} was"),
            (f"Who is {person}?", f"who {person} is"),
            (f"How does a {thing} work?", f"how a {thing} works"),
            (f"How does the {thing} work?", f"how the {thing} works"),
            (f"When was the {thing} {verb}?", f"when the {thing} was {verb}"),
            (f"Who {verb} the {thing}?", f"who {verb} the {thing}"),
            (f"What is the population of {place}?", f"the population of {place}"),
            (f"How many people live in {place}?", f"how many people live in {place}"),
            (f"How far is it from {place} to {other}?", f"how far it is from {place} to {other}"),
            (f"Who won the {thing} in {year}?", f"who won the {thing} in {year}"),
            (f"What happened in {year}?", f"what happened in {year}"),
            (f"Who is the president of {place}?", f"who the president of {place} is"),
            (f"How much does {article(thing)} cost?", f"how much {article(thing)} costs"),
            (f"What is the weather in {place}?", f"what the weather in {place} is"),
            (f"What is the theory of {thing}?", f"the theory of {thing}"),
            (f"What is the square root of {year}?", f"the square root of {year}"),
            (f"What is {article(thing)}?", f"what {article(thing)} is"),
            (f"What does the word {made_up} mean?", f"what the word {made_up} means"),
            (f"Where is {person}?", f"where {person} is"),
            (f"How old is {person}?", f"how old {person} is"),
            (f"When did {person} die?", f"when {person} died"),
        ]
    )
    return question, tt.UNKNOWN.format(what=what)


def names_chat(p: Pieces, middle: Document) -> Document:
    """Somebody tells one or two things about himself, chats, and asks for one of them later."""
    name, food, city = p.name(), p.choice(t.FOODS), p.choice(list(t.CAPITALS.values()))
    animal, pet = p.choice(["dog", "cat", "horse", "rabbit"]), p.name()
    facts = [
        p.choice(
            [
                (
                    "My name is {n}.",
                    "Nice to meet you, {n}.",
                    "What is my name?",
                    "Your name is {n}.",
                ),
                ("I am {n}.", "Hello {n}! How can I help you?", "Who am I?", "You are {n}."),
            ]
        ),
        (
            "I like {f}.",
            "I have heard that {f} can be very good.",
            "What do I like?",
            "You like {f}.",
        ),
        ("I live in {c}.", "{c} is a nice place.", "Where do I live?", "You live in {c}."),
        (
            "I have a {a} named {b}.",
            "{b} is a lovely name for a {a}.",
            "What is the name of my {a}?",
            "The name of your {a} is {b}.",
        ),
    ]
    told = p.sample(facts, p.between(1, 2))
    asked = p.choice(told)
    fill = {"n": name, "f": food, "c": city, "a": animal, "b": pet}
    start = [(u.format(**fill), a.format(**fill)) for u, a, _, _ in told]
    turns = [*start, None, (asked[2].format(**fill), asked[3].format(**fill))]
    document: Document = []
    for turn in turns:
        document += middle if turn is None else [("user", turn[0]), ("assistant", turn[1])]
    return document
