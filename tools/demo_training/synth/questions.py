"""Short questions with one right answer: facts, grammar, arithmetic, lists of words."""

from __future__ import annotations

from ..tables import WORDS, load, words
from .pieces import Pieces, upper_first
from .talk import one_of_stems

QA = tuple[str, str]
facts = load("facts")


def _of_a_form(p: Pieces, name: str) -> QA:
    """A question about an entry of a table: facts.forms or a mixture of them."""
    form = facts.forms[p.mixed(getattr(facts, name)) if hasattr(facts, name) else name]
    key, value = p.item(WORDS[form["table"]])
    fields = value | {"a": key} if isinstance(value, dict) else {"a": key, "b": value}
    share, *rare = form.get("rare", [0])
    if share and p.chance(share):
        form = {"say": rare}
    question, answer = p.say_all(form, **fields)
    return question, answer


def _members(p: Pieces) -> QA:
    """Members of a category, or the category of a member."""
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
    question, answer = (x.format(**fields) for x in p.choice(facts.calendar))
    return question, answer


def word_list(p: Pieces) -> QA:
    """A task on a list of frequent words, so that few of them are split into several tokens."""
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
    """A question whose answer is in a table."""
    kind = p.choice(facts.kinds)
    return FACTS[kind](p) if kind in FACTS else _of_a_form(p, kind)


def _sum(p: Pieces) -> QA:
    high = p.choice([10, 20, 100])
    a, b = p.between(0, high), p.between(0, high)
    sign, word = p.choice([("+", "plus"), ("-", "minus")])
    if sign == "-" and b > a:
        a, b = b, a
    value = a + b if sign == "+" else a - b
    shown = sign if p.chance(0.5) else word
    request = p.say(facts.sum, a=a, o=shown, b=b)
    if shown == sign and p.chance(0.1):
        return f"{a}{sign}{b}", f"{a} {sign} {b} = {value}."
    return request, f"{a} {shown} {b} {'=' if shown == sign else 'is'} {value}."


def _word_problem(p: Pieces) -> QA:
    n, a, b, o = p.name(), p.between(2, 20), p.between(1, 19), p.choice(facts.counted)
    if p.chance(0.5):
        verb, past = p.choice(facts.gains)
        texts, ask, c = facts.more, "", a + b
    else:
        a, b = max(a, b), min(a, b)
        verb, past = p.choice(facts.losses)
        texts, ask, c = facts.left, p.say(facts.left_asks, n=n, o=o), a - b
    question, answer = (
        x.format(n=n, a=a, b=b, c=c, o=o, verb=verb, past=past, ask=ask) for x in texts
    )
    return question, answer


def arithmetic(p: Pieces) -> QA:
    """Sums and differences up to 100, times up to 12, halves, comparisons, small word problems."""
    r = p.random.random()
    if r < 0.45:
        return _sum(p)
    if r < 0.60:
        a, b = p.between(2, 12), p.between(2, 12)
        return p.say(facts.times, a=a, b=b), f"{a} times {b} is {a * b}."
    if r < 0.66:
        a, b = p.between(1, 100), p.between(1, 100)
        if a == b:
            b += 1
        return f"Which number is bigger, {a} or {b}?", f"{max(a, b)} is bigger than {min(a, b)}."
    if r < 0.72:
        a = p.between(1, 50)
        return f"What is half of {2 * a}?", f"Half of {2 * a} is {a}."
    return _word_problem(p)
