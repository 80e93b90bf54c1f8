"""Short texts with a question and distractors of the same form, and sentences to copy."""

from __future__ import annotations

from ..tables import load, words
from .pieces import Document, Pieces, fix_articles

QA = tuple[str, str]
texts = load("reading")


def _value(p: Pieces, kind: str) -> str:
    """Return a value of a relation. A fifth of the things are random words."""
    if kind in ("thing", "bought"):
        noun = p.word() if p.chance(0.25) else p.choice(words.things)
        return p.choice(words.colours) + " " + noun if p.chance(0.7) else noun
    return p.say(texts.values[kind])


def _ask(p: Pieces, text: list[str], question: str, answer: str) -> QA:
    """Return the statements and the question in one message."""
    asked = p.say(texts.shapes, t=" ".join(text), q=question)
    return fix_articles(asked), fix_articles(answer)


def same_relation(p: Pieces) -> tuple[list[str], list[QA]]:
    """Return two to five statements of one relation about people, and shuffled questions."""
    kind = p.choice(list(texts.relations))
    relation, count = texts.relations[kind], p.choice([2, 2, 3, 3, 4, 5])
    people = p.sample(words.names, count)
    values: list[str] = []
    while len(values) < count:
        value = _value(p, kind)
        if value not in values:
            values.append(value)
    text = [relation["says"].format(n=n, v=v) for n, v in zip(people, values, strict=True)]
    questions = []
    for n, v in zip(people, values, strict=True):
        asks = relation["who"] if p.chance(0.65) else relation["asks"]
        questions.append((p.say(asks, n=n, v=v), relation["answer"].format(n=n, v=v)))
    p.random.shuffle(questions)
    return text, questions


def several_questions(p: Pieces) -> Document:
    """Return statements of one relation and up to four questions on them, asked in turn."""
    text, questions = same_relation(p)
    first = _ask(p, text, *questions[0])
    turns: Document = []
    for question, answer in [first, *questions[1 : p.between(2, 4)]]:
        turns += [("user", fix_articles(question)), ("assistant", fix_articles(answer))]
    return turns


def mixed_relations(p: Pieces) -> QA:
    """Return three to six statements of different relations about two or three people."""
    people = p.sample(words.names, p.between(2, 3))
    kinds = p.sample(list(texts.relations), p.between(2, 3))
    facts = [(n, k, _value(p, k)) for n in people for k in kinds]
    p.random.shuffle(facts)
    facts = facts[: p.between(3, 6)]
    asked = p.choice(facts)
    text = [texts.relations[k]["says"].format(n=n, v=v) for n, k, v in facts]
    return _ask_for_value(p, text, *asked)


def _ask_for_value(p: Pieces, text: list[str], name: str, kind: str, value: str) -> QA:
    """Return a question for the value of a relation."""
    relation = texts.relations[kind]
    question = p.say(relation["asks"], n=name)
    return _ask(p, text, question, relation["answer"].format(n=name, v=value))


def moved(p: Pieces) -> QA:
    """Ask for the last state of a thing that was put somewhere, or given to somebody."""
    a, b, c = p.sample(words.names, 3)
    thing, places = _value(p, "thing"), p.sample(words.places, 3)
    if p.chance(0.5):
        text = [f"{a} put the {thing} in the {places[0]}.", f"{b} went to the {places[1]}."]
        if p.chance(0.5):
            text.append(f"Then {a} moved the {thing} to the {places[2]}.")
            places[0] = places[2]
        return _ask(p, text, f"Where is the {thing}?", f"The {thing} is in the {places[0]}.")
    text = [f"{a} had a {thing}.", f"{a} gave the {thing} to {b}.", f"{c} went home."]
    owner = b
    if p.chance(0.4):
        text.append(f"Later {b} gave the {thing} to {c}.")
        owner = c
    return _ask(p, text, f"Who has the {thing} now?", f"{owner} has the {thing} now.")


def compare(p: Pieces) -> QA:
    """Return two people of different age."""
    a, b = p.sample(words.names, 2)
    x, y = p.sample(range(5, 90), 2)
    text = [f"{a} is {x} years old.", f"{b} is {y} years old."]
    word = p.choice(["older", "younger"])
    first = a if (x > y) == (word == "older") else b
    return _ask(p, text, f"Who is {word}?", f"{first} is {word}.")


def short_story(p: Pieces) -> QA:
    """Return a sentence or two of the texts with one fact inside."""
    kind = p.choice(list(texts.relations))
    name, value = p.name(), _value(p, kind)
    text = [p.sentence(), texts.relations[kind]["says"].format(n=name, v=value)]
    if p.chance(0.5):
        text.append(p.sentence())
    return _ask_for_value(p, text, name, kind, value)


def reading(p: Pieces) -> QA:
    """Return a short text, a question, an answer in a whole sentence."""
    r = p.random.random()
    if r < 0.50:
        text, questions = same_relation(p)
        return _ask(p, text, *questions[0])
    if r < 0.70:
        return mixed_relations(p)
    if r < 0.85:
        return moved(p)
    return compare(p) if r < 0.90 else short_story(p)


def copying(p: Pieces) -> Document:
    """Return a text of any kind to be repeated: sentences, questions, rare words, made-up names."""
    r = p.random.random()
    if r < 0.45:
        text = p.sentence().strip()
    elif r < 0.6:
        text = p.choice(p.sources.problems)[0][:300].strip()
    elif r < 0.8:
        text = p.phrase()
    elif r < 0.9:
        text = " ".join(p.word() for _ in range(p.between(1, 8)))
    else:
        text = "".join(p.choice("abcdefghijklmnoprstuvwz") for _ in range(p.between(4, 9)))
    return [("user", p.say(texts.copy_requests, z=text)), ("assistant", text)]
