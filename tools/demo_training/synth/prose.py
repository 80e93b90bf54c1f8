"""Plain requests with free answers: stories, essays, poems, letters."""

from __future__ import annotations

from ..tables import load, words
from .pieces import Pieces, Topic, article, fix_articles, upper_first
from .talk import advice_request

prose = load("prose")
POEM_TYPES = ("poem", "song", "rap", "limerick")
PLAIN_TYPES = [x for x in words.text_types if x not in ("summary", "critique")]
ESSAY_SENTENCES = 24  # what `essay` can fill without repeating itself


def fill(template: str, topic: Topic) -> str:
    """Return an essay or poem template with a topic in it."""
    return template.format(**topic.words())


def essay(p: Pieces, topic: Topic, count: int, opener: bool = True) -> list[str]:
    """Return `count` different sentences: opener, middles by kind of topic, closer if long."""
    head = [p.choice(prose.openers)] if opener and count > 1 and p.chance(0.6) else []
    tail = [p.choice(prose.closers)] if count > 2 and p.chance(0.7) else []
    own = prose.by_kind[topic.kind]
    wanted = count - len(head) - len(tail)
    first = min(len(own), max((wanted + 1) // 2, wanted - len(prose.middles)))
    middle = p.ordered(own, first) + p.ordered(prose.middles, wanted - first)
    return [fill(s, topic) for s in head + middle + tail]


def long_essay(p: Pieces, topic: Topic, count: int, opener: bool = True) -> list[str]:
    """Return `count` different sentences on a topic, fewer if the tables have no more.

    A long answer is a subset of one list of sentences in its order.
    """
    if count <= ESSAY_SENTENCES // 2:
        return essay(p, topic, max(1, count), opener)
    own = [*prose.by_kind[topic.kind], *prose.middles, *prose.more]
    head, tail = p.choice(prose.openers), p.choice(prose.closers)
    return [fill(s, topic) for s in (head, *p.ordered(own, count - 2), tail)]


def story(p: Pieces, plots: list | None = None, **given: str) -> list[str]:
    """Return six sentences of a plot. `given` fixes fields: n name, x and y beings, g goal."""
    plot = p.choice(plots or prose.plots)
    name = given.get("n") or p.name()
    fields = p.fields(prose.story, n=name, m=p.partner(name)) | given
    return [fix_articles(p.say(step, **fields)) for step in plot]


def story_request(p: Pieces) -> tuple[str, list[str]]:
    """Return (request, sentences) of a story: named, plain, about two beings, or about a goal."""
    fields = {"x": p.draw("being"), "n": p.name(), "a": p.draw("adjectives")}
    kind = p.mixed([[0.3, "named"], [0.6, "plain"], [0.7, "pair"], [0.92, "goal"], [1, "free"]])
    asks, plots = prose.story_requests[kind], prose.plots
    if kind == "pair":
        fields["y"], plots = p.draw("being"), [plots[0], plots[2]]
    elif kind == "goal":
        fields["g"], plots = p.draw("goal"), prose.goal_plots
    return p.say(asks, **fields), story(p, plots, **fields)


def poem(p: Pieces, topic: Topic) -> list[str]:
    """Return two or three couplets on a topic, one string each."""
    return [upper_first(fill(s, topic)) for s in p.ordered(prose.couplets, p.between(2, 3))]


def typed_request(p: Pieces) -> tuple[str, list[str]]:
    """Return (request, sentences) of a poem, a review, a plan and so on."""
    topic = p.topic()
    kind = p.mixed([[0.3, "poem"], [0.45, "haiku"], [1, ""]]) or p.choice(PLAIN_TYPES)
    if kind in ("poem", "haiku") and p.chance(0.1):
        topic = Topic(p.draw("nature"), "nature")
        made = [fill(p.choice(prose.haikus), topic)] if kind == "haiku" else poem(p, topic)
        return p.choice(prose.haiku_requests if kind == "haiku" else prose.poem_requests), made
    request = p.say(prose.type_requests, y=kind, t=topic.text)
    if kind == "haiku":
        return request, [fill(p.choice(prose.haikus), topic)]
    if kind in POEM_TYPES:
        return request, poem(p, topic)
    start = f"Here is {article(kind)} about {topic.text}."
    return request, [start, *essay(p, topic, p.between(2, 5))]


def letter_request(p: Pieces) -> tuple[str, list[str]]:
    """Return (request, sentences) of a letter to a named person or to somebody like "my boss"."""
    topic = p.topic()
    receiver = p.choice(prose.receivers) if p.chance(0.5) else p.name()
    request = p.say(prose.letter_requests, n=receiver, t=topic.text)
    greeting = f"Dear {receiver.split(' ')[-1]}, I hope you are well."
    body = essay(p, topic, p.between(1, 3), opener=False)
    end = "Best wishes, " + p.partner(receiver) + "."
    return request, [greeting, f"I am writing to you about {topic.text}.", *body, end]


def essay_request(p: Pieces, topic: Topic) -> str:
    """Return a request for a text about a topic."""
    return p.say(prose.essay_requests, t=topic.text)


def plain_request(p: Pieces) -> tuple[str, list[str]]:
    """Return (request, sentences of an answer) of any plain kind."""
    r = p.random.random()
    if r < 0.32:
        return story_request(p)
    if r < 0.66:
        topic = p.topic()
        return essay_request(p, topic), essay(p, topic, p.between(3, 7))
    if r < 0.80:
        return typed_request(p)
    return advice_request(p) if r < 0.90 else letter_request(p)
