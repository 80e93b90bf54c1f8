"""Constraints on form: each takes a free answer and returns the rule in words and an answer that keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import tables as t
from .pieces import Pieces
from .prose import ESSAY_REQUESTS, essay
from .talk import HOW_TO_REQUESTS, how_to

Checks = list[tuple[str, Any]]


@dataclass
class Draft:
    """A request in the making: its text, free sentences, the answer, the rules said, the checks."""

    request: str
    sentences: list[str]
    answer: str = ""
    rules: list[str] = field(default_factory=list)
    checks: Checks = field(default_factory=list)

    def keep(self, answer: str, rule: str, kind: str, arg: Any = None) -> None:
        """Sets the answer, says the rule, notes its check."""
        self.answer = answer
        self.rules.append(rule)
        self.checks.append((kind, arg))


def _retopic(p: Pieces, draft: Draft, count: int) -> list[str]:
    """Replaces the request by one for an essay of `count` sentences; returns them."""
    topic = p.topic()
    draft.request = p.choice(ESSAY_REQUESTS).format(t=topic.text)
    draft.sentences = essay(p, topic, count)
    return draft.sentences


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


def bullets(p: Pieces, draft: Draft) -> None:
    n = p.between(2, 6)
    if p.chance(0.6):
        key, tips = how_to(p)
        n = min(n, len(tips))
        draft.request = p.choice(HOW_TO_REQUESTS).format(k=key)
        lines = p.ordered(tips, n)
        if p.chance(0.3):
            draft.request = f"Give me exactly {n} bullet points on how to {key}."
    else:
        lines = _retopic(p, draft, n)
    rule = p.choice(
        [
            f"Use exactly {n} bullet points.",
            f"The answer must be a list of exactly {n} bullet points in markdown, each line "
            "starting with *.",
            f"Answer with {n} bullet points.",
            f"Give exactly {n} bullets that start with *.",
        ]
    )
    draft.keep("\n".join("* " + x for x in lines), rule, "bullets", n)


def end_phrase(p: Pieces, draft: Draft) -> None:
    phrase = p.choice(
        [
            "Is there anything else I can help with?",
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


def json_format(p: Pieces, draft: Draft) -> None:
    topic = p.topic()
    draft.request = p.choice(ESSAY_REQUESTS).format(t=topic.text)
    keys = ["topic", "text", "note"]
    rule = p.choice(
        [
            "Your whole answer should be in JSON format.",
            "Give the entire output as JSON.",
            "Answer with valid JSON only.",
            "Answer in JSON format.",
            "Wrap the entire output in JSON format. You can use markdown ticks such as ```.",
        ]
    )
    if p.chance(0.25):
        keys = p.sample(["name", "text", "title", "summary", "info", p.word(), p.word()], 3)
        rule += f' Use the keys "{keys[0]}", "{keys[1]}" and "{keys[2]}".'
    elif p.chance(0.4):
        draft.request, rule = f"Tell me about {topic.text} in JSON format.", ""
    keys = list(dict.fromkeys(keys))
    values = [topic.text, *essay(p, topic, 2, opener=False)]
    body = json.dumps(dict(zip(keys, values, strict=False)), indent=2, ensure_ascii=False)
    draft.keep("```json\n" + body + "\n```" if "ticks" in rule else body, rule, "json")


def title(p: Pieces, draft: Draft) -> None:
    words = p.choice(["The ", "A ", "My "]) + p.word().capitalize() + " " + p.word().capitalize()
    rule = p.choice(
        [
            "Put a title over your answer, in double angle brackets: <<title>>.",
            "Give it a title in double angle brackets, like <<my title>>.",
            "It needs a title between << and >>.",
        ]
    )
    draft.keep(f"<<{words}>>\n\n" + " ".join(draft.sentences), rule, "title")


def postscript(p: Pieces, draft: Draft) -> None:
    mark = p.choice(["P.S.", "P.P.S"])
    rule = p.choice(
        [
            f"After your answer, add a postscript that begins with {mark}",
            f"Add a postscript that starts with {mark} at the end.",
            f"Close with a postscript beginning with {mark}",
        ]
    )
    last = p.choice(
        [
            "Remember to smile today.",
            "Write to me soon.",
            f"Do not forget to bring some {p.choice(t.FOODS)}.",
            f"I will see you at the {p.choice(t.PLACES)}.",
        ]
    )
    draft.keep(" ".join(draft.sentences) + f"\n\n{mark} {last}", rule, "ps", mark)


def placeholders(p: Pieces, draft: Draft) -> None:
    n = p.between(1, 5)
    rule = p.choice(
        [
            f"Put at least {n} placeholders into the answer, in square brackets like [address].",
            f"Leave at least {n} blanks in square brackets, for example [name].",
        ]
    )
    fields = [
        "name",
        "address",
        "date",
        "place",
        "email",
        "phone",
        "time",
        "city",
        "company",
        "title",
    ]
    ends = [
        f"Please write to [{x}]." if i % 2 else f"The {x} is [{x}]."
        for i, x in enumerate(p.ordered(fields, n))
    ]
    draft.keep(" ".join([*draft.sentences, *ends]), rule, "placeholders", n)


def highlight(p: Pieces, draft: Draft) -> None:
    n = p.between(1, 4)
    rule = p.choice(
        [
            f"Mark at least {n} parts of your answer with markdown, like *this part*.",
            f"Highlight at least {n} parts with markdown, i.e. *highlighted part*.",
        ]
    )
    lines = list(draft.sentences)
    if len(lines) < n:
        lines = list(_retopic(p, draft, n + 1))
    for i in range(n):
        words = lines[i].split(" ")
        first = min(len(words) - 1, 1)
        last = min(len(words) - 1, first + p.between(0, 2))
        words[first] = "*" + words[first]
        words[last] += "*"
        lines[i] = " ".join(words)
    draft.keep(" ".join(lines), rule, "highlight", n)


def _parts(p: Pieces, draft: Draft, count: int, per_part: int = 2) -> list[str]:
    """The text of `count` parts of one essay, without a repeated sentence."""
    lines = _retopic(p, draft, count * per_part)
    groups = [lines[i * per_part : (i + 1) * per_part] for i in range(count)]
    return [" ".join(g) for g in groups]


def paragraphs(p: Pieces, draft: Draft) -> None:
    n = p.between(2, 5)
    rule = p.choice(
        [
            f"Make it {n} paragraphs with the markdown divider *** between them.",
            f"Write exactly {n} paragraphs, separated by the markdown divider: ***",
            f"There should be {n} paragraphs. Separate them with ***.",
        ]
    )
    parts = _parts(p, draft, n, p.between(1, 2))
    draft.keep("\n\n***\n\n".join(parts), rule, "paragraphs", n)


def first_word(p: Pieces, draft: Draft) -> None:
    n = p.between(2, 4)
    which = p.between(1, n)
    ordinal = ["first", "second", "third", "fourth"][which - 1]
    word = p.choice(["First", "Now", "Still", "Today", "However", p.word().capitalize()])
    rule = p.choice(
        [
            f"Write {n} paragraphs, separated by two line breaks. "
            f"Paragraph {which} must start with the word {word}.",
            f"Use {n} paragraphs with an empty line between them. "
            f"The {ordinal} one starts with the word {word}.",
        ]
    )
    parts = _parts(p, draft, n, 1)
    parts[which - 1] = f"{word}, {parts[which - 1]}"
    draft.keep("\n\n".join(parts), rule, "firstword", (n, which, word))


def sections(p: Pieces, draft: Draft) -> None:
    n, mark = p.between(2, 4), p.choice(["Section", "SECTION", "Part", "PARAGRAPH"])
    rule = p.choice(
        [
            f"Your answer must have {n} sections. Mark the beginning of each section with {mark} X, "
            f"such as:\n{mark} 1\n[content of section 1]\n{mark} 2\n[content of section 2]",
            f"Use {n} sections, each starting with {mark} and its number.",
        ]
    )
    parts = _parts(p, draft, n, p.between(1, 2))
    text = "\n\n".join(f"{mark} {i + 1}\n{x}" for i, x in enumerate(parts))
    draft.keep(text, rule, "sections", (mark, n))


KEYWORD_LINES = (
    "This has something to do with {k}.",
    "Here we also think of {k}.",
    "Do not forget {k}.",
)


def keywords(p: Pieces, draft: Draft) -> None:
    """The words come in the order asked and side by side, so that greedy decoding knows the next."""
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
    word, n = p.word(), p.between(2, 4)
    rule = p.choice(
        [
            f"The word {word} should appear at least {n} times.",
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


def two_answers(p: Pieces, draft: Draft) -> None:
    topic = p.topic()
    draft.request = p.choice(ESSAY_REQUESTS).format(t=topic.text)
    rule = p.choice(
        [
            "Give two different answers with six asterisks ****** between them.",
            "Write two different responses, separated by 6 asterisk symbols: ******",
        ]
    )
    n, m = p.between(1, 3), p.between(1, 3)
    lines = essay(p, topic, n + m)
    second = [f"Here is another view of {topic.text}.", *lines[n:]]
    draft.keep(" ".join(lines[:n]) + "\n\n******\n\n" + " ".join(second), rule, "two")


def few_sentences(p: Pieces, draft: Draft) -> None:
    n = p.between(2, 6)
    rule = p.choice(
        [
            f"Use fewer than {n} sentences.",
            f"Answer in less than {n} sentences.",
            f"Your response should contain less than {n} sentences.",
        ]
    )
    draft.keep(" ".join(_retopic(p, draft, p.between(1, n - 1))), rule, "fewsent", n)


def many_sentences(p: Pieces, draft: Draft) -> None:
    n = p.between(2, 8)
    rule = p.choice([f"Use at least {n} sentences.", f"Write at least {n} sentences."])
    draft.keep(" ".join(_retopic(p, draft, n + p.between(0, 1))), rule, "manysent", n)


def at_least(p: Pieces, draft: Draft) -> None:
    n = p.choice([20, 30, 40, 50, 80, 100, 150])
    rule = p.choice(
        [
            f"Answer with at least {n} words.",
            f"Use at least {n} words.",
            f"Your answer should contain at least {n} words.",
        ]
    )
    lines = _retopic(p, draft, min(22, n // 7 + 2))
    while sum(len(s.split()) for s in lines) < n:
        lines = _retopic(p, draft, 24)
    draft.keep(" ".join(lines), rule, "atleast", n)


def few_words(p: Pieces, draft: Draft) -> None:
    n = p.choice([20, 30, 40, 50, 80, 100])
    rule = p.choice(
        [
            f"Use fewer than {n} words.",
            f"Answer with less than {n} words.",
            f"Stay under {n} words.",
        ]
    )
    kept: list[str] = []
    for line in _retopic(p, draft, 6):
        if len(" ".join([*kept, line]).split()) < n:
            kept.append(line)
    draft.keep(" ".join(kept) or "All right.", rule, "fewwords", n)


FORMS: tuple[Callable[[Pieces, Draft], None], ...] = (
    bullets,
    bullets,
    end_phrase,
    end_phrase,
    json_format,
    json_format,
    title,
    postscript,
    placeholders,
    highlight,
    paragraphs,
    first_word,
    sections,
    keywords,
    keywords,
    frequency,
    forbidden,
    two_answers,
    few_sentences,
    many_sentences,
    at_least,
    few_words,
)
# which may be followed by a rule on every letter, and by which
WITH_ANY_CASE = {"bullets", "title", "paragraphs", "highlight", "two", "atleast", "fewsent"}
WITH_NO_COMMA = {"ps", "sections", "keywords", "manysent", "fewwords", "frequency"}
