"""Short questions with one right answer: facts, grammar, arithmetic, lists of words."""

from __future__ import annotations

from ..tables import WORDS, load, words
from .pieces import Pieces, upper_first
from .sums import doubled, operation
from .talk import one_of_stems

QA = tuple[str, str]
facts = load("facts")


def _of_a_form(p: Pieces, name: str) -> QA:
    """Return a question about an entry of a table: facts.forms or a mixture of them."""
    form = facts.forms[p.mixed(getattr(facts, name)) if hasattr(facts, name) else name]
    key, value = p.item(WORDS[form["table"]])
    fields = value | {"a": key} if isinstance(value, dict) else {"a": key, "b": value}
    share, *rare = form.get("rare", [0])
    if share and p.chance(share):
        form = {"say": rare}
    question, answer = p.say_all(form, **fields)
    return question, answer


def _members(p: Pieces) -> QA:
    """Return members of a category, or the category of a member."""
    kind, members = p.item(words.categories)
    if p.chance(0.25):
        x = p.choice(members)
        question, answer = (p.say(rule, x=x, k=kind) for rule in facts.list["kind"])
        return question, answer
    n = p.between(1, min(5, len(members)))
    names = p.ordered(members, n)
    plural = "countries" if kind == "country" else kind + "s"
    count = str(n) if p.chance(0.5) or n == 1 else words.number_words[n - 2]
    if n == 1:
        return p.say(facts.list["one"], k=kind), upper_first(names[0]) + "."
    answer = ", ".join(names[:-1]) + " and " + names[-1] + "."
    return p.say(facts.list["ask"], n=count, k=plural), upper_first(answer)


def _translation(p: Pieces) -> QA:
    language, table = p.item(words.translations)
    a, b = p.item(table)
    question, answer = (p.say(rule, a=a, b=b, x=language) for rule in facts.translation)
    return question, answer


def _calendar(p: Pieces) -> QA:
    days, months, i, j = words.days, words.months, p.between(0, 6), p.between(0, 11)
    fields = {"day": days[i], "next_day": days[(i + 1) % 7], "last_day": days[(i - 1) % 7]}
    fields |= {"month": months[j], "next_month": months[(j + 1) % 12], "number": str(j + 1)}
    fields["last_month"] = months[(j - 1) % 12]
    question, answer = (p.say(rule, **fields) for rule in p.choice(facts.calendar))
    return question, answer


def word_list(p: Pieces) -> QA:
    """Return a task on a list of frequent words, most of which are single tokens."""
    if p.chance(0.5):
        some = [p.choice(p.sources.common) for _ in range(p.between(3, 7))]
    else:
        some = p.sample([x for xs in words.categories.values() for x in xs], p.between(3, 6))
    text = ", ".join(some)
    fields = {"some": text, "capitals": text.upper(), "reversed": ", ".join(some[::-1])}
    fields |= {"first": some[0], "last": some[-1], "count": str(len(some))}
    fields |= {"lines": "\n".join(some), "bullets": "\n".join("* " + w for w in some)}
    question, answer = (x.format(**fields) for x in p.choice(facts.word_list))
    return question, answer


FACTS = {
    "list": _members,
    "general": lambda p: one_of_stems(p, words.general),
    "translation": _translation,
    "calendar": _calendar,
}


def fact(p: Pieces) -> QA:
    """Return a question whose answer is in a table."""
    kind = p.choice(facts.kinds)
    return FACTS[kind](p) if kind in FACTS else _of_a_form(p, kind)


def _word_problem(p: Pieces) -> QA:
    n, a, b, o = p.name(), p.between(2, 20), p.between(1, 19), p.choice(facts.counted)
    own = p.chance(0.3)
    if p.chance(0.5):
        verb, past, stem = p.choice(facts.gains)
        texts, c = p.choice(facts.own_more if own else facts.more), a + b
    else:
        a, b = max(a, b), min(a, b)
        verb, past, stem = p.choice(facts.losses)
        texts, c = p.choice(facts.own_left if own else facts.left), a - b
    given = {"n": n, "a": a, "b": b, "c": c, "o": o, "verb": verb, "past": past, "stem": stem}
    given["ask"] = p.say(facts.own_asks if own else facts.left_asks, **given)
    question, answer = (x.format(**given) for x in texts)
    return question, answer


def arithmetic(p: Pieces) -> QA:
    """Return the four operations below 100, halves, doubles, comparisons, small word problems."""
    r = p.random.random()
    if r < 0.72:
        return operation(p)
    if r < 0.79:
        return doubled(p)
    if r < 0.84:
        a, b = p.between(1, 100), p.between(1, 100)
        if a == b:
            b += 1
        return p.say(facts.bigger, a=a, b=b), f"{max(a, b)} is bigger than {min(a, b)}."
    return _word_problem(p)
