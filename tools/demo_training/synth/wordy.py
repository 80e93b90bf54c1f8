"""Long-winded requests for a text, as people write them to an assistant, and what to answer."""

from __future__ import annotations

from dataclasses import dataclass

from . import prose_tables as pt
from . import tables as t
from .long_essay import long_essay
from .pieces import Pieces, Topic, article, upper_first
from .prose import fill, poem

KINDS = (
    *t.TEXT_TYPES,
    *t.items("""essay,blog post,email,letter,cover letter,story,short story
article,tweet,job description,lesson plan,joke,social media post,sales pitch,fairy tale,plot
template,rubric,brochure
book review,advice column,weekly plan,meal plan,funny note,sentence,paragraph,script
acrostic,ballad,slogan,quiz,list of ideas,reference letter,thank you note,term paper,conversation
short biography,welcome message,newsletter,public notice,game,weather report,motto,love letter"""),
)
AUDIENCES = t.items("""kids,teenagers,my students,parents,busy people,beginners,my colleagues
old friends
a small company,young readers,tourists,farmers,my neighbours,people who love animals
music fans,a group of teachers,people who have never heard of it,my whole family
new customers,history fans""")
STYLES = t.items("""in a funny way,in a formal tone,in an angry tone,in the style of an old poet
in a polite way,in a strange style,like a pirate,like a news reader
from the point of view of a child,as if you were a king,so that everybody understands it
with a lot of feeling,in simple words,in a persuasive way,like a rapper
in a weird manner,as a professional would,with some humour,in a friendly voice
in a dramatic style""")
ROLES = t.items("""a poet,a teacher of history,a famous cook,a gardener,a lawyer,a travel guide
a doctor
a coach,a comedian,a journalist,a scientist,a shop owner,a wizard,a librarian,a musician
an old sailor,a parent""")
TEXT_WISHES = (
    "Write {ak} about {t}.",
    "Can you write {ak} about {t}?",
    "Could you please write {ak} for {a} about {t}?",
    "I would like to have {ak} on {t}, {s}.",
    "Write {ak} {s} that is about {t}.",
    "Please compose {ak} for {a} in which {t} {is} important.",
    "Create {ak} with the topic {t}.",
    "I need {ak} about {t} for {a}.",
    "Help me to come up with {ak} about {t} {s}.",
    "You are {r}. Write {ak} about {t} for {a}.",
    "Imagine you are {r} and have to write {ak} on {t}.",
    "{a2} asked me for {ak} about {t}. Can you do it for me?",
    "Generate {ak} that tells {a} about {t}.",
    "Draft {ak} on the subject of {t} and write it {s}.",
    "What would {ak} about {t} look like? Write one {s}.",
    "Make {ak} out of this idea: {t}.",
)
QUESTIONS = (
    "What are the pros and cons of {t}?",
    "What do you know about {t}?",
    "Why is it that people talk so much about {t}?",
    "How would you explain {t} to {a}?",
    "Can you tell me more about {t} {s}?",
    "What is the difference between {t} and {w}?",
    "Which is better for {a}, {t} or {w}?",
    "Is it a good idea to spend a weekend with {t}?",
    "How does {t} compare to {w} in daily life?",
    "Do you think that {t} will change the world of {w}?",
    "I have been reading about {t} lately. What should I know about it?",
    "What can {a} learn from {t}?",
    "I want to talk about {t} at work. What could I say {s}?",
    "Tell {a} about {t}.",
    "Name some reasons why {a} should care about {t}.",
    "Who came up with {t}, and what is it good for?",
    "Describe {t} {s}.",
    "Discuss {t} with {a} in mind.",
)
REWRITES = (
    'Rewrite the following sentence {s}: "{z}"',
    "Rewrite this {s}.\n\n{z}",
    "Can you improve the text below?\n{z}",
    'Here is a sentence: "{z}" Please write more about it.',
    "Summarize this for {a}: {z}",
    'Continue the story that starts with "{z}"',
    "What is this passage about? {z}",
    "Elaborate on this line {s}: {z}",
    'Someone told me: "{z}" What would you say to that?',
)
LEADS = (
    "I have to hand in a text tomorrow and I am a little late.",
    "We are preparing a small event for our friends next week.",
    "Hello! I hope you can help me with this.",
    "My teacher gave me this task and I do not know how to begin.",
    "For a project at school I need some help.",
    "My friend asked me for this and I want to surprise my friend.",
    "Imagine that you are speaking to {a}.",
    "I just moved to {c} and want to get to know people.",
    "{n} and I have been thinking about {w} for a long time.",
    "My {w} company is in trouble, so please be careful.",
    "I am writing a book about {w} and {v}.",
    "Hi there,",
    "Act as {r}.",
    "This is for {a}.",
    "We have a new {w} in {c} and everybody is excited.",
    "{z}",
)
DETAILS = (
    "The text is for {a}.",
    "Write it {s}.",
    "My name is {n} and I live in {c}.",
    "It will be read by {a}.",
    "Do not forget that {n} likes {w}.",
    "Talk about {w} too.",
    "It should sound like {r} wrote it.",
    "I will use it next {d}.",
    "The name of the hero is {n}.",
    "Be creative.",
    "Please be brief about {w}.",
    "Make it fun to read.",
    "It has to be ready by {d}.",
    "Explain why {w} matters.",
)


@dataclass(frozen=True)
class Wish:
    """A request, its topic, and the kind of text it asks for ("" = none in particular)."""

    request: str
    topic: Topic
    kind: str = ""

    def sentences(self, p: Pieces, count: int) -> list[str]:
        """About `count` different sentences that answer the request."""
        if self.kind in ("poem", "song", "rap", "limerick", "ballad") and count <= 6:
            return poem(p, self.topic)[:count]
        if self.kind == "haiku" and count <= 3:
            return [fill(p.choice(pt.HAIKUS), self.topic)]
        if "letter" in self.kind or "email" in self.kind:
            head = ["Hello, I hope you are well.", f"I am writing to you about {self.topic.text}."]
            return [*head, *long_essay(p, self.topic, count - 2, opener=False)][:count]
        if self.kind and count > 2:
            start = f"Here is {article(self.kind)} about {self.topic.text}."
            return [start, *long_essay(p, self.topic, count - 1)]
        return long_essay(p, self.topic, count)


def rich_topic(p: Pieces) -> Topic:
    """A topic, often with a clause or two behind it."""
    topic = p.topic()
    r = p.random.random()
    if r < 0.6:
        return topic
    word = p.word
    tail = p.choice(
        [
            f" in {p.choice(t.PLACES)}s",
            f" and {word()}",
            f" without {word()}",
            f" for {p.choice(AUDIENCES)}",
            f" in the year {p.between(1500, 2040)}",
            f" of {p.name()}",
            f" that made {word()} famous",
            f" with {article(p.choice(t.ADJECTIVES))} {word()}",
            f" near {p.choice(list(t.CAPITALS.values()))}",
            f" who met {p.name()} at the {p.choice(t.PLACES)}",
        ]
    )
    return Topic(topic.text + tail, topic.kind, topic.plural or tail.startswith(" and "))


def _fields(p: Pieces, topic: Topic) -> dict[str, str]:
    audience = p.choice(AUDIENCES)
    return {
        "t": topic.text,
        "is": "are" if topic.plural else "is",
        "a": audience,
        "a2": upper_first(audience),
        "s": p.choice(STYLES),
        "r": p.choice(ROLES),
        "w": p.word(),
        "v": p.word(),
        "n": p.name(),
        "c": p.choice(list(t.CAPITALS.values())),
        "d": p.choice([*t.DAYS, *t.MONTHS]),
        "z": p.choice(p.sources.sentences),
    }


def wish(p: Pieces) -> Wish:
    """One request of one to four sentences."""
    topic, r = rich_topic(p), p.random.random()
    fields, kind = _fields(p, topic), ""
    if r < 0.5:
        kind = p.choice(KINDS)
        fields["ak"] = article(("short " if p.chance(0.1) else "") + kind)
        text = p.choice(TEXT_WISHES).format(**fields)
    elif r < 0.85:
        text = p.choice(QUESTIONS).format(**fields)
    else:
        topic = Topic("this text")
        text = p.choice(REWRITES).format(**fields)
    if p.chance(0.25):
        text = p.choice(LEADS).format(**fields) + p.choice([" ", " ", "\n"]) + text
    for _ in range(p.choice([0, 0, 0, 1, 1, 2])):
        text += " " + p.choice(DETAILS).format(**_fields(p, topic))
    return Wish(text, topic, kind)
