"""Long-winded requests for a text, as people write them to an assistant, and what to answer."""

from __future__ import annotations

from dataclasses import dataclass

from ..tables import GRAMMAR, load, words
from .pieces import Pieces, Topic, article
from .prose import fill, long_essay, poem, prose

requests = load("requests")
KINDS = (*words.text_types, *words.text_kinds)


@dataclass(frozen=True)
class Wish:
    """A request, its topic, and the kind of text it asks for ("" = none in particular)."""

    request: str
    topic: Topic
    kind: str = ""

    def sentences(self, p: Pieces, count: int) -> list[str]:
        """Return about `count` different sentences that answer the request."""
        if self.kind in ("poem", "song", "rap", "limerick", "ballad") and count <= 6:
            return poem(p, self.topic)[:count]
        if self.kind == "haiku" and count <= 3:
            return [fill(p.choice(prose.haikus), self.topic)]
        if "letter" in self.kind or "email" in self.kind:
            head = ["Hello, I hope you are well.", f"I am writing to you about {self.topic.text}."]
            return [*head, *long_essay(p, self.topic, count - 2, opener=False)][:count]
        if self.kind and count > 2:
            start = f"Here is {article(self.kind)} about {self.topic.text}."
            return [start, *long_essay(p, self.topic, count - 1)]
        return long_essay(p, self.topic, count)


def rich_topic(p: Pieces) -> Topic:
    """Return a topic, often with a clause or two after it."""
    topic = p.topic()
    if p.chance(0.6):
        return topic
    tail = p.say(GRAMMAR["rich_topic"])
    return Topic(topic.text + tail, topic.kind, topic.plural or tail.startswith(" and "))


def wish(p: Pieces) -> Wish:
    """Return a request of one to four sentences."""
    topic, r = rich_topic(p), p.random.random()

    def fields(topic: Topic) -> dict[str, object]:
        return p.fields(requests.fields, t=topic.text, **{"is": "are" if topic.plural else "is"})

    given, kind = fields(topic), ""
    if r < 0.5:
        kind = p.choice(KINDS)
        named = ("short " if p.chance(0.1) else "") + kind
        text = p.say(requests.text_wishes, k=named, **given)
    elif r < 0.85:
        text = p.say(requests.questions, **given)
    else:
        topic = Topic("this text")
        text = p.say(requests.rewrites, **given)
    if p.chance(0.25):
        text = p.say(requests.leads, **given) + p.choice([" ", " ", "\n"]) + text
    for _ in range(p.choice([0, 0, 0, 1, 1, 2])):
        detail = p.choice(requests.details)
        text += " " + p.say(detail, **fields(topic))
    return Wish(text, topic, kind)
