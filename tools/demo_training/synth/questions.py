"""Short questions with one right answer: facts, grammar, arithmetic, lists of words."""

from __future__ import annotations

from . import tables as t
from . import trivia
from .pieces import Pieces, article, upper_first

QA = tuple[str, str]


def _geography(p: Pieces) -> QA:
    r = p.random.random()
    if r < 0.6:
        a, b = p.item(t.CAPITALS)
        if p.chance(0.15):
            return f"{b} is the capital of which country?", f"{b} is the capital of {a}."
        return p.choice(
            [
                "What is the capital of {a}?",
                "Name the capital of {a}.",
                "Which city is the capital of {a}?",
                "Tell me the capital city of {a}.",
                "What's the capital of {a}?",
            ]
        ).format(a=a), f"The capital of {a} is {b}."
    if r < 0.8:
        a, b = p.item(t.CONTINENTS)
        return f"Which continent is {a} in?", f"{upper_first(a)} is in {b}."
    a, b = p.item(t.LANGUAGES)
    request = p.choice(["Which language do people speak in {a}?", "What do they speak in {a}?"])
    return request.format(a=a), f"People in {a} speak {b}."


def _animal(p: Pieces) -> QA:
    a, (sound, food, home, young, legs) = p.item(t.ANIMALS)
    ax, some = article(a), upper_first(article(a))
    return p.choice(
        [
            (f"What sound does {ax} make?", f"{some} {sound}."),
            (f"What does {ax} eat?", f"{some} eats {food}."),
            (f"What do {a}s like to eat?", f"{some} eats {food}."),
            (f"Where does {ax} live?", f"{some} lives {home}."),
            (f"What is a baby {a} called?", f"A baby {a} is called {article(young)}."),
            (f"How many legs does {ax} have?", f"{some} has {legs} legs."),
            (f"Is {ax} an animal?", f"Yes, {ax} is an animal."),
            (
                f"What does {ax} eat and where does it live?",
                f"{some} eats {food} and lives {home}.",
            ),
            (
                f"Where does {ax} live and what does it eat?",
                f"{some} lives {home} and eats {food}.",
            ),
        ]
    )


def _grammar(p: Pieces) -> QA:
    r = p.random.random()
    if r < 0.3:
        a, b = p.item(t.OPPOSITES)
        request = p.choice(
            [
                "What is the opposite of {a}?",
                "Give me the opposite of '{a}'.",
                "Which word means the opposite of {a}?",
                "What's the opposite of {a}?",
            ]
        )
        return request.format(a=a), f"The opposite of {a} is {b}."
    if r < 0.4:
        a, b = p.item(t.SYNONYMS)
        return f"What is another word for {a}?", f"Another word for {a} is {b}."
    if r < 0.5:
        a, b = p.item(t.PLURALS)
        return f"What is the plural of {a}?", f"The plural of {a} is {b}."
    a, b = p.item(t.PAST)
    if r < 0.65:
        return f"What is the past tense of {a}?", f"The past tense of {a} is {b}."
    rest = p.choice(
        [
            "to the " + p.choice(t.PLACES),
            "to " + p.choice(t.PLACES) + " every day",
            "with " + p.name(),
            "every day",
            "in the " + p.choice(t.PLACES),
            "the " + p.word(),
        ]
    )
    who = p.choice(["I", "They", "We", "You"])
    request = p.choice(
        [
            "Rewrite the sentence in the past tense: {z}",
            "Put this sentence into the past tense: {z}",
            "Change this into the past tense: {z}",
        ]
    )
    return request.format(z=f"{who} {a} {rest}."), f"{who} {b} {rest}."


def _lists_of_kinds(p: Pieces) -> QA:
    kind, members = p.item(t.CATEGORIES)
    if p.chance(0.25):
        x = p.choice(members)
        return f"What kind of thing is {x}?", f"{upper_first(x)} is {article(kind)}."
    n = p.between(1, min(5, len(members)))
    names = p.ordered(members, n)
    plural = "countries" if kind == "country" else kind + "s"
    count = str(n) if p.chance(0.5) or n == 1 else t.NUMBER_WORDS[n - 2]
    if n == 1:
        return f"Name one {kind}.", upper_first(names[0]) + "."
    answer = ", ".join(names[:-1]) + " and " + names[-1] + "."
    request = p.choice(
        ["Name {n} {k}.", "List {n} {k}.", "Can you name {n} {k}?", "Give me {n} {k}."]
    )
    return request.format(n=count, k=plural), upper_first(answer)


def _meaning(p: Pieces) -> QA:
    if p.chance(0.25):
        a, b = p.item(trivia.MASS_NOUNS)
        request = p.choice(["What is {a}?", "Explain {a}.", "What does {a} mean?", "Define {a}."])
        return request.format(a=a), f"{upper_first(a)} is {b}."
    a, b = p.item(trivia.DEFINITIONS)
    ax = article(a)
    request = p.choice(
        [
            "What is {ax}?",
            "Explain what {ax} is.",
            "What does the word {a} mean?",
            "Define {a}.",
            "What's {ax}?",
        ]
    )
    return request.format(ax=ax, a=a), f"{upper_first(ax)} is {b}."


def _reason(p: Pieces) -> QA:
    a, b = p.item(trivia.REASONS)
    return p.choice(["Why {a}?", "Why {a}?", "Tell me: why {a}?"]).format(a=a), b


def _general(p: Pieces) -> QA:
    stems, answer = p.item(trivia.GENERAL)
    return p.choice(stems.split("|")), answer


def _translation(p: Pieces) -> QA:
    language, table = p.choice([("French", t.FRENCH), ("German", t.GERMAN), ("Spanish", t.SPANISH)])
    a, b = p.item(table)
    request = p.choice(
        [
            "Translate '{a}' into {x}.",
            "How do you say '{a}' in {x}?",
            "What is '{a}' in {x}?",
            "What is the {x} word for {a}?",
            "Translate {a} to {x}.",
        ]
    )
    return request.format(a=a, x=language), f"'{upper_first(a)}' in {language} is '{b}'."


def _calendar(p: Pieces) -> QA:
    days, months, i, j = t.DAYS, t.MONTHS, p.between(0, 6), p.between(0, 11)
    return p.choice(
        [
            (f"Which day comes after {days[i]}?", f"{days[(i + 1) % 7]} comes after {days[i]}."),
            (f"Which day comes before {days[i]}?", f"{days[(i - 1) % 7]} comes before {days[i]}."),
            (
                f"Which month comes after {months[j]}?",
                f"{months[(j + 1) % 12]} comes after {months[j]}.",
            ),
            (f"What is month number {j + 1}?", f"Month number {j + 1} is {months[j]}."),
            ("How many days are in a week?", "There are 7 days in a week."),
            ("How many months are in a year?", "There are 12 months in a year."),
            (f"If today is {days[i]}, what day is tomorrow?", f"Tomorrow is {days[(i + 1) % 7]}."),
        ]
    )


def _colour(p: Pieces) -> QA:
    a, b = p.item(t.COLOURS_OF)
    if p.chance(0.3):
        return f"Which colour does {a} have?", f"{upper_first(a)} is {b}."
    return p.choice([f"What colour is {a}?", f"What color is {a}?"]), f"{upper_first(a)} is {b}."


def word_list(p: Pieces) -> QA:
    """A task on a list of frequent words, so that few of them are split into several tokens."""
    if p.chance(0.5):
        words = [p.choice(p.sources.common) for _ in range(p.between(3, 7))]
    else:
        words = p.sample([x for xs in t.CATEGORIES.values() for x in xs], p.between(3, 6))
    some = ", ".join(words)
    return p.choice(
        [
            (f"Write these words in reverse order: {some}", ", ".join(words[::-1])),
            (f"Which word comes first in this list? {some}", f"The first word is {words[0]}."),
            (f"Which word comes last in this list? {some}", f"The last word is {words[-1]}."),
            (
                f"How many words are in this list? {some}",
                f"There are {len(words)} words in the list.",
            ),
            (f"Copy this list: {some}", some),
            (f"Write in capital letters: {some}", some.upper()),
            (f"Write each word on its own line: {some}", "\n".join(words)),
            (f"Make a bullet list of these words: {some}", "\n".join("* " + w for w in words)),
        ]
    )


FACTS = (
    _geography,
    _geography,
    _animal,
    _animal,
    _grammar,
    _grammar,
    _lists_of_kinds,
    _meaning,
    _meaning,
    _reason,
    _general,
    _general,
    _general,
    _translation,
    _calendar,
    _colour,
)


def fact(p: Pieces) -> QA:
    """A question whose answer is in a table."""
    return p.choice(FACTS)(p)


def _sum(p: Pieces) -> QA:
    high = p.choice([10, 20, 100])
    a, b = p.between(0, high), p.between(0, high)
    sign, word = p.choice([("+", "plus"), ("-", "minus")])
    if sign == "-" and b > a:
        a, b = b, a
    value = a + b if sign == "+" else a - b
    shown = sign if p.chance(0.5) else word
    request = p.choice(
        [
            "What is {a} {o} {b}?",
            "Calculate {a} {o} {b}.",
            "{a} {o} {b} =",
            "How much is {a} {o} {b}?",
        ]
    )
    if shown == sign and p.chance(0.1):
        return f"{a}{sign}{b}", f"{a} {sign} {b} = {value}."
    answer = f"{a} {sign} {b} = {value}." if shown == sign else f"{a} {word} {b} is {value}."
    return request.format(a=a, o=shown, b=b), answer


def _word_problem(p: Pieces) -> QA:
    n, a, b = p.name(), p.between(2, 20), p.between(1, 19)
    o = p.choice(["apples", "coins", "books", "pens", "cards", "stones", "eggs", "sweets"])
    if p.chance(0.5):
        verb, past = p.choice([("buys", "bought"), ("finds", "found"), ("gets", "got")])
        return (
            f"{n} has {a} {o} and {verb} {b} more. How many {o} does {n} have now?",
            f"{n} had {a} {o} and {past} {b} more. {a} + {b} = {a + b}. {n} now has {a + b} {o}.",
        )
    a, b = max(a, b), min(a, b)
    verb, past = p.choice([("gives away", "gave away"), ("loses", "lost"), ("sells", "sold")])
    ask = p.choice(
        ["How many are left?", f"How many {o} are left?", f"How many does {n} have now?"]
    )
    return (
        f"{n} has {a} {o} and {verb} {b}. {ask}",
        f"{n} had {a} {o} and {past} {b}. {a} - {b} = {a - b}. There are {a - b} {o} left.",
    )


def arithmetic(p: Pieces) -> QA:
    """Sums and differences up to 100, times up to 12, halves, comparisons, small word problems."""
    r = p.random.random()
    if r < 0.45:
        return _sum(p)
    if r < 0.60:
        a, b = p.between(2, 12), p.between(2, 12)
        request = p.choice(["What is {a} times {b}?", "Calculate {a} x {b}.", "What is {a} * {b}?"])
        return request.format(a=a, b=b), f"{a} times {b} is {a * b}."
    if r < 0.66:
        a, b = p.between(1, 100), p.between(1, 100)
        if a == b:
            b += 1
        return f"Which number is bigger, {a} or {b}?", f"{max(a, b)} is bigger than {min(a, b)}."
    if r < 0.72:
        a = p.between(1, 50)
        return f"What is half of {2 * a}?", f"Half of {2 * a} is {a}."
    return _word_problem(p)
