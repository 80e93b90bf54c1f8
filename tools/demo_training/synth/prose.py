"""Plain requests with free answers: stories, essays, poems, letters."""

from __future__ import annotations

from . import prose_tables as pt
from . import tables as t
from .pieces import Pieces, Topic, article, fix_articles, upper_first
from .talk import advice_request

STORY_REQUESTS = [
    "Write a short story about {ax} named {n}.",
    "Tell me a story about {n} the {x}.",
    "Can you write a story about {ax}? Call it {n}.",
    "Make up a tale with {ax} called {n}.",
    "Tell me a story about {ax} named {n}.",
]
PLAIN_STORY_REQUESTS = [
    "Write a short story about {ax}.",
    "Tell me a story about {ax}.",
    "Please tell me a bedtime story about {ax}.",
    "Can you make up a story with {ax} in it?",
]
GOAL_STORY_REQUESTS = [
    "Write a short story about {ax} who wants to {g}.",
    "Tell me a story about {ax} that wants to {g}.",
    "Can you tell me a tale of {ax} who would like to {g}?",
    "Write a story about {ax} who dreams of one day being able to {g}.",
]
PAIR_STORY_REQUESTS = [
    "Write a short story about {ax} and {ay}.",
    "Tell me a story about {ax} and {ay}.",
    "Can you tell me a story of {ax} who meets {ay}?",
]
ESSAY_REQUESTS = [
    "Write about {t}.",
    "Write a short text about {t}.",
    "Tell me about {t}.",
    "Tell me something about {t}.",
    "What can you say about {t}?",
    "Write a blog post about {t}.",
    "Describe {t}.",
    "Explain {t} to a child.",
    "Give me a short essay on {t}.",
    "Write an article on {t}.",
    "I need a paragraph about {t}.",
    "Please write a speech about {t}.",
    "Write a description of {t}.",
    "What do you think about {t}?",
]
TYPE_REQUESTS = [
    "Write {ay} about {t}.",
    "Can you write {ay} about {t}?",
    "Please create {ay} for {t}.",
    "I want you to write {ay} about {t}.",
    "Help me with {ay} on {t}.",
    "Could you give me {ay} about {t}?",
]
POEM_TYPES = ("poem", "song", "rap", "limerick")
LETTER_REQUESTS = [
    "Write an email to {n} about {t}.",
    "Write a letter to {n} about {t}.",
    "Draft a short message to {n} on {t}.",
    "Help me write an email to {n} about {t}.",
]
RECEIVERS = ["my boss", "my teacher", "my neighbour", "my mother", "my landlord", "my best friend"]


def fill(template: str, topic: Topic) -> str:
    """An essay or poem template with a topic in it."""
    words = topic.words()
    return template.format(es="" if topic.plural else "es", **words)


def essay(p: Pieces, topic: Topic, count: int, opener: bool = True) -> list[str]:
    """`count` different sentences on a topic: opener, middles by kind of topic, closer if long."""
    head = [p.choice(pt.OPENERS)] if opener and count > 1 and p.chance(0.6) else []
    tail = [p.choice(pt.CLOSERS)] if count > 2 and p.chance(0.7) else []
    own = pt.BY_KIND[topic.kind]
    wanted = count - len(head) - len(tail)
    first = min(len(own), max((wanted + 1) // 2, wanted - len(pt.MIDDLES)))
    middle = p.ordered(own, first) + p.ordered(pt.MIDDLES, wanted - first)
    return [fill(s, topic) for s in head + middle + tail]


def story(p: Pieces, **given: str) -> list[str]:
    """Six sentences of one of the plots; `given` fixes fields: n name, x and y beings."""
    return _tell(p, p.choice(pt.PLOTS), **given)


def _tell(p: Pieces, plot: list, **given: str) -> list[str]:
    """One wording of each step of a plot, with one set of names and things."""
    n = given.get("n") or p.name()
    fields = {
        "n": n,
        "m": p.partner(n),
        "x": p.being(),
        "y": p.word() if p.chance(0.15) else p.choice(list(t.ANIMALS)),
        "a": p.choice(t.ADJECTIVES),
        "b": p.choice(t.ADJECTIVES),
        "p": p.choice(t.PLACES),
        "q": p.choice(t.PLACES),
        "o": p.choice(t.OBJECTS),
        "w": p.choice(t.WEATHER),
        "f": p.choice(t.FOODS),
    } | given
    return [fix_articles(p.choice(step).format(**fields)) for step in plot]


def story_request(p: Pieces) -> tuple[str, list[str]]:
    """(request, sentences) of a story: named, plain, about two beings, or about a goal."""
    being, name, r = p.being(), p.name(), p.random.random()
    fields = {"x": being, "ax": article(being), "n": name}
    if r < 0.40:
        return p.choice(STORY_REQUESTS).format(**fields), story(p, n=name, x=being)
    if r < 0.57:
        return p.choice(PLAIN_STORY_REQUESTS).format(**fields), story(p, n=name, x=being)
    if r < 0.72:
        other = p.being()
        request = p.choice(PAIR_STORY_REQUESTS).format(ay=article(other), **fields)
        return request, _tell(p, p.choice([pt.PLOTS[0], pt.PLOTS[2]]), n=name, x=being, y=other)
    goal = p.goal()
    request = p.choice(GOAL_STORY_REQUESTS).format(g=goal, **fields)
    return request, _tell(p, p.choice(pt.GOAL_PLOTS), n=name, x=being, g=goal)


def poem(p: Pieces, topic: Topic) -> list[str]:
    """Two or three couplets on a topic, one string each."""
    return [upper_first(fill(s, topic)) for s in p.ordered(pt.COUPLETS, p.between(2, 3))]


def typed_request(p: Pieces) -> tuple[str, list[str]]:
    """(request, sentences) of a poem, a review, a plan and so on."""
    topic = p.topic()
    kind = p.choice(("poem", "poem", "haiku", *t.TEXT_TYPES))
    request = p.choice(TYPE_REQUESTS).format(ay=article(kind), t=topic.text)
    if kind == "haiku":
        return request, [fill(p.choice(pt.HAIKUS), topic)]
    if kind in POEM_TYPES:
        return request, poem(p, topic)
    return request, [
        f"Here is {article(kind)} about {topic.text}.",
        *essay(p, topic, p.between(2, 5)),
    ]


def letter_request(p: Pieces) -> tuple[str, list[str]]:
    """(request, sentences) of a letter to a named person or to somebody like "my boss"."""
    topic = p.topic()
    if p.chance(0.5):
        receiver = p.choice(RECEIVERS)
        greeting = "Dear " + receiver.split(" ")[-1]
    else:
        receiver = p.name()
        greeting = "Dear " + receiver
    request = p.choice(LETTER_REQUESTS).format(n=receiver, t=topic.text)
    body = [greeting + ", I hope you are well.", f"I am writing to you about {topic.text}."]
    return request, [
        *body,
        *essay(p, topic, p.between(1, 3), opener=False),
        "Best wishes, " + p.partner(receiver) + ".",
    ]


def plain_request(p: Pieces) -> tuple[str, list[str]]:
    """(request, sentences of an answer) of any plain kind."""
    r = p.random.random()
    if r < 0.32:
        return story_request(p)
    if r < 0.66:
        topic = p.topic()
        return p.choice(ESSAY_REQUESTS).format(t=topic.text), essay(p, topic, p.between(3, 7))
    if r < 0.80:
        return typed_request(p)
    if r < 0.90:
        return advice_request(p)
    return letter_request(p)
