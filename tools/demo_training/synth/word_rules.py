"""Rules on letters, words and sentences of an answer."""

from __future__ import annotations

from collections.abc import Callable

from .draft import Draft, retopic
from .pieces import Pieces

CASE_RULES = {
    "lower": (
        "Use only lowercase letters.",
        "Your whole answer should be in lowercase.",
        "Do not use any capital letters.",
        "All letters must be lowercase.",
        "Write everything in small letters, no capitals.",
        "No capital letters are allowed.",
    ),
    "upper": (
        "Use only capital letters.",
        "Your whole answer should be in uppercase.",
        "Write everything in capital letters.",
        "Answer in all caps.",
        "All letters must be capitals.",
    ),
    "nocomma": (
        "Do not use any commas.",
        "Use no commas in your answer.",
        "Your answer must not contain a comma.",
        "Avoid commas.",
        "Please leave out all commas.",
        "No commas, please.",
    ),
    "quote": (
        "Put your whole answer in double quotation marks.",
        "Wrap the entire answer in double quotes.",
        "Begin and end your answer with a double quotation mark.",
    ),
}
CASE_CHANGES: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "nocomma": lambda text: text.replace(",", ""),
    "quote": lambda text: '"' + text.replace('"', "'") + '"',
}


def whole_text(p: Pieces, draft: Draft, kind: str) -> None:
    """Rules on every letter: lower, upper, nocomma, quote. May follow another rule."""
    text = draft.answer or " ".join(draft.sentences)
    draft.keep(CASE_CHANGES[kind](text), p.choice(CASE_RULES[kind]), kind)


def end_phrase(p: Pieces, draft: Draft) -> None:
    """The answer ends with a given phrase."""
    phrase = p.choice(
        [
            "Can I do anything else for you?",
            "That is all you need to know.",
            "Have a nice day.",
            "I hope this helps.",
            "The end.",
            "See you soon.",
            "Any other questions?",
            p.phrase().capitalize() + ".",
            p.word().capitalize() + " " + p.word() + p.choice([".", "!"]),
        ]
    )
    rule = p.choice(
        [
            f'End your answer with the exact phrase "{phrase}"',
            f"Finish your response with this exact phrase: {phrase} No other words should follow.",
            f'The last words must be "{phrase}"',
            f'Your answer must end with: "{phrase}"',
        ]
    )
    draft.keep(" ".join(draft.sentences) + " " + phrase, rule, "end", phrase)


KEYWORD_LINES = (
    "This has something to do with {k}.",
    "Here we also think of {k}.",
    "Do not forget {k}.",
)


def keywords(p: Pieces, draft: Draft) -> None:
    """One to three words, in the order asked and side by side: greedy text knows the next."""
    words = [p.word() for _ in range(p.between(1, 3))]
    rule = p.choice(
        [
            "Include the keywords {k}.",
            "Use the words {k} in your answer.",
            "Your answer must include the following keywords: {k}.",
            "Make sure to include these words: {k}.",
        ]
    ).format(k=", ".join(words))
    lines = [KEYWORD_LINES[i % 3].format(k=k) for i, k in enumerate(words)]
    text = " ".join([draft.sentences[0], *lines, *draft.sentences[1:]])
    draft.keep(text, rule, "keywords", words)


def frequency(p: Pieces, draft: Draft) -> None:
    """A word occurs at least n times."""
    word, n = p.word(), p.between(2, 4)
    rule = p.choice(
        [
            f"The word {word} has to come up at least {n} times.",
            f"Use the word {word} at least {n} times.",
        ]
    )
    lines = [
        f"This is about {word}.",
        f"I like the word {word}.",
        f"So we say {word} again.",
        f"And once more: {word}.",
    ]
    draft.keep(" ".join([*draft.sentences, *lines[:n]]), rule, "frequency", (word, n))


def forbidden(p: Pieces, draft: Draft) -> None:
    """One to three words do not occur."""
    words = [p.word() for _ in range(p.between(1, 3))]
    rule = p.choice(
        [
            "Do not use the words {k}.",
            "Do not include the following keywords: {k}.",
            "Avoid these words: {k}.",
        ]
    ).format(k=", ".join(words))
    lines = [s for s in draft.sentences if not any(w in s.lower() for w in words)]
    draft.keep(" ".join(lines) or "All right.", rule, "forbidden", words)


def few_sentences(p: Pieces, draft: Draft) -> None:
    """Fewer than n sentences."""
    n = p.between(2, 6)
    rule = p.choice(
        [
            f"Use fewer than {n} sentences.",
            f"Answer in less than {n} sentences.",
            f"Your response should contain less than {n} sentences.",
        ]
    )
    draft.keep(" ".join(retopic(p, draft, p.between(1, n - 1))), rule, "fewsent", n)


def many_sentences(p: Pieces, draft: Draft) -> None:
    """At least n sentences."""
    n = p.between(2, 8)
    rule = p.choice([f"Use at least {n} sentences.", f"Write at least {n} sentences."])
    draft.keep(" ".join(retopic(p, draft, n + p.between(0, 1))), rule, "manysent", n)


def at_least(p: Pieces, draft: Draft) -> None:
    """At least n words."""
    n = p.choice([20, 30, 40, 50, 80, 100, 150])
    rule = p.choice(
        [
            f"Answer with at least {n} words.",
            f"Use at least {n} words.",
            f"Your answer should contain at least {n} words.",
        ]
    )
    lines = retopic(p, draft, min(22, n // 7 + 2))
    while sum(len(s.split()) for s in lines) < n:
        lines = retopic(p, draft, 24)
    draft.keep(" ".join(lines), rule, "atleast", n)


def few_words(p: Pieces, draft: Draft) -> None:
    """Fewer than n words."""
    n = p.choice([20, 30, 40, 50, 80, 100])
    rule = p.choice(
        [
            f"Use fewer than {n} words.",
            f"Answer with less than {n} words.",
            f"Stay under {n} words.",
        ]
    )
    kept: list[str] = []
    for line in retopic(p, draft, 6):
        if len(" ".join([*kept, line]).split()) < n:
            kept.append(line)
    draft.keep(" ".join(kept) or "All right.", rule, "fewwords", n)
