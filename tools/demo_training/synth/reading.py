"""Short texts and a question about them, with distractors of the same form; sentences to copy."""

from __future__ import annotations

from dataclasses import dataclass

from . import tables as t
from .pieces import Document, Pieces, fix_articles

QA = tuple[str, str]


@dataclass(frozen=True)
class Relation:
    """One kind of statement: a sentence, questions for its value or its person, and their answers.

    The fields are {n} the person and {v} the value; `who` may be empty.
    """

    says: str
    asks: tuple[str, ...]
    answers: str
    who: tuple[str, ...] = ()


RELATIONS = {
    "thing": Relation(
        "{n} has a {v}.",
        ("What does {n} have?", "Which thing does {n} have?"),
        "{n} has the {v}.",
        ("Who has the {v}?", "Who has a {v}?", "Who owns the {v}?"),
    ),
    "place": Relation(
        "{n} went to the {v}.",
        ("Where did {n} go?", "Where is {n}?"),
        "{n} went to the {v}.",
        ("Who went to the {v}?",),
    ),
    "food": Relation(
        "{n} likes {v}.",
        ("What does {n} like?", "What should I cook for {n}?"),
        "{n} likes {v}.",
        ("Who likes {v}?",),
    ),
    "city": Relation(
        "{n} lives in {v}.",
        ("Where does {n} live?", "In which city does {n} live?"),
        "{n} lives in {v}.",
        ("Who lives in {v}?",),
    ),
    "job": Relation(
        "{n} is a {v}.",
        ("What is the job of {n}?", "What does {n} do?"),
        "{n} is a {v}.",
        ("Who is the {v}?", "Who is a {v}?"),
    ),
    "age": Relation(
        "{n} is {v} years old.",
        ("How old is {n}?",),
        "{n} is {v} years old.",
        ("Who is {v} years old?",),
    ),
    "pet": Relation(
        "The pet of {n} is a {v}.",
        ("What pet does {n} have?",),
        "{n} has a {v}.",
        ("Who has the {v}?",),
    ),
    "bought": Relation(
        "{n} bought a {v} at the market.",
        ("What did {n} buy?",),
        "{n} bought a {v}.",
        ("Who bought the {v}?",),
    ),
}


def _value(p: Pieces, kind: str) -> str:
    """A value of a relation; a fifth of the things are random words."""
    if kind in ("thing", "bought"):
        noun = p.word() if p.chance(0.25) else p.choice(t.THINGS)
        return p.choice(t.COLOURS) + " " + noun if p.chance(0.7) else noun
    table = {
        "place": t.PLACES,
        "food": t.FOODS,
        "city": list(t.CAPITALS.values()),
        "job": t.JOBS,
        "pet": list(t.ANIMALS),
    }
    return str(p.between(5, 90)) if kind == "age" else p.choice(table[kind])


def _ask(p: Pieces, text: list[str], question: str, answer: str) -> QA:
    """The statements and the question in one message."""
    shape = p.choice(
        [
            "{t} {q}",
            "{t} {q}",
            "{t}\n{q}",
            "{t}\n\n{q}",
            "{t} Question: {q}",
            "Read this and answer. {t} {q}",
            "{q} {t}",
        ]
    )
    asked = shape.format(t=" ".join(text), q=question)
    return fix_articles(asked), fix_articles(answer)


def same_relation(p: Pieces) -> tuple[list[str], list[QA]]:
    """Two to five statements of one relation about different people, and shuffled questions."""
    kind = p.choice(list(RELATIONS))
    relation, count = RELATIONS[kind], p.choice([2, 2, 3, 3, 4, 5])
    people = p.sample(t.NAMES, count)
    values: list[str] = []
    while len(values) < count:
        value = _value(p, kind)
        if value not in values:
            values.append(value)
    text = [relation.says.format(n=n, v=v) for n, v in zip(people, values, strict=True)]
    questions = []
    for n, v in zip(people, values, strict=True):
        asks = relation.who if relation.who and p.chance(0.65) else relation.asks
        questions.append((p.choice(asks).format(n=n, v=v), relation.answers.format(n=n, v=v)))
    p.random.shuffle(questions)
    return text, questions


def several_questions(p: Pieces) -> Document:
    """Statements of one relation and up to four questions on them, one after the other."""
    text, questions = same_relation(p)
    first = _ask(p, text, *questions[0])
    turns: Document = []
    for question, answer in [first, *questions[1 : p.between(2, 4)]]:
        turns += [("user", fix_articles(question)), ("assistant", fix_articles(answer))]
    return turns


def mixed_relations(p: Pieces) -> QA:
    """Three to six statements of different relations about two or three people."""
    people, kinds = p.sample(t.NAMES, p.between(2, 3)), p.sample(list(RELATIONS), p.between(2, 3))
    facts = [(n, k, _value(p, k)) for n in people for k in kinds]
    p.random.shuffle(facts)
    facts = facts[: p.between(3, 6)]
    n, k, v = p.choice(facts)
    text = [RELATIONS[kind].says.format(n=who, v=value) for who, kind, value in facts]
    answer = RELATIONS[k].answers.format(n=n, v=v)
    return _ask(p, text, p.choice(RELATIONS[k].asks).format(n=n), answer)


def moved(p: Pieces) -> QA:
    """A thing is put somewhere, or given to somebody; the last state is asked for."""
    a, b, c = p.sample(t.NAMES, 3)
    thing, places = _value(p, "thing"), p.sample(t.PLACES, 3)
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
    """Two people of different age or height."""
    a, b = p.sample(t.NAMES, 2)
    x, y = p.sample(range(5, 90), 2)
    text = [f"{a} is {x} years old.", f"{b} is {y} years old."]
    word = p.choice(["older", "younger"])
    first = a if (x > y) == (word == "older") else b
    return _ask(p, text, f"Who is {word}?", f"{first} is {word}.")


def short_story(p: Pieces) -> QA:
    """A sentence or two of the texts with one fact inside."""
    kind = p.choice(list(RELATIONS))
    name, value = p.name(), _value(p, kind)
    text = [p.choice(p.sources.sentences), RELATIONS[kind].says.format(n=name, v=value)]
    if p.chance(0.5):
        text.append(p.choice(p.sources.sentences))
    question = p.choice(RELATIONS[kind].asks).format(n=name)
    return _ask(p, text, question, RELATIONS[kind].answers.format(n=name, v=value))


def reading(p: Pieces) -> QA:
    """A short text, a question, an answer in a whole sentence."""
    r = p.random.random()
    if r < 0.50:
        text, questions = same_relation(p)
        return _ask(p, text, *questions[0])
    if r < 0.70:
        return mixed_relations(p)
    if r < 0.85:
        return moved(p)
    return compare(p) if r < 0.90 else short_story(p)


COPY_REQUESTS = (
    "Repeat this text exactly: {z}",
    "Copy the following sentence.\n{z}",
    "Say this again word for word: {z}",
    "{z}\nRepeat the text above.",
    "Repeat after me: {z}",
    'Say "{z}"',
    "Please write exactly this: {z}",
    "Repeat the following sentence: {z}",
)


def copying(p: Pieces) -> Document:
    """A text of any kind to be repeated: sentences, questions, rare words, made-up names."""
    r = p.random.random()
    if r < 0.45:
        text = p.choice(p.sources.sentences).strip()
    elif r < 0.6:
        text = p.choice(p.sources.problems)[0][:300].strip()
    elif r < 0.8:
        text = p.phrase()
    elif r < 0.9:
        text = " ".join(p.word() for _ in range(p.between(1, 8)))
    else:
        text = "".join(p.choice("abcdefghijklmnoprstuvwz") for _ in range(p.between(4, 9)))
    return [("user", p.choice(COPY_REQUESTS).format(z=text)), ("assistant", text)]
