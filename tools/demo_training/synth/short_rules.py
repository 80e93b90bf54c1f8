"""The rules of short requests: each changes a request in the making so that its answer keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ..tables import load
from .pieces import Pieces
from .prose import essay, essay_request, plain_request
from .talk import how_to, talk

Checks = list[tuple[str, Any]]
wordings = vars(load("short_rules"))
content = load("content")
CASE_CHANGES: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "nocomma": lambda text: text.replace(",", ""),
    "quote": lambda text: '"' + text.replace('"', "'") + '"',
}


class Draft:
    """A request in the making.

    Attributes:
        request: its text.
        sentences: free ones, that answer it.
        answer: as far as a rule has made it.
        rules, checks: of the rules that are kept, their wordings and (kind, argument).
    """

    def __init__(self, p: Pieces):
        self.p = p
        self.request, self.sentences = plain_request(p)
        self.answer = ""
        self.rules: list[str] = []
        self.checks: Checks = []

    def rule(self, kind: str, arg: Any = None, **fields: object) -> None:
        """Say a rule and notes its check."""
        self.rules.append(self.p.say(wordings[kind], **fields))
        self.checks.append((kind, arg))

    def text(self, *more: str) -> str:
        """Return the sentences, and more after them."""
        return " ".join([*self.sentences, *more])

    def retopic(self, count: int) -> list[str]:
        """Replace the request by one for an essay of `count` sentences. Returns the sentences."""
        topic = self.p.topic()
        self.request = essay_request(self.p, topic)
        self.sentences = essay(self.p, topic, count)
        return self.sentences

    def essay_parts(self, count: int, per_part: int) -> list[str]:
        """Return the text of `count` parts of one essay, without a repeated sentence."""
        lines = self.retopic(count * per_part)
        return [" ".join(lines[i * per_part : (i + 1) * per_part]) for i in range(count)]

    def whole_text(self, kind: str) -> None:
        """Add a rule on every letter, a key of CASE_CHANGES. May follow another rule."""
        self.answer = CASE_CHANGES[kind](self.answer or self.text())
        self.rule(kind)


def end_phrase(p: Pieces, draft: Draft) -> None:
    """Require an answer that ends with a given phrase."""
    phrase = p.say(wordings["end_phrase"])
    draft.rule("end", phrase, phrase=phrase)
    draft.answer = draft.text(phrase)


def keywords(p: Pieces, draft: Draft) -> None:
    """Require one to three words, in the given order and side by side."""
    words = [p.word() for _ in range(p.between(1, 3))]
    draft.rule("keywords", words, k=", ".join(words))
    lines = [content.keyword_lines[i % 3].format(k=k) for i, k in enumerate(words)]
    draft.answer = " ".join([draft.sentences[0], *lines, *draft.sentences[1:]])


def frequency(p: Pieces, draft: Draft) -> None:
    """Require a word at least n times."""
    word, n = p.word(), p.between(2, 4)
    draft.rule("frequency", (word, n), w=word, n=n)
    draft.answer = draft.text(*(x.format(k=word) for x in content.again_lines[:n]))


def forbidden(p: Pieces, draft: Draft) -> None:
    """Forbid one to three words."""
    words = [p.word() for _ in range(p.between(1, 3))]
    draft.rule("forbidden", words, k=", ".join(words))
    lines = [s for s in draft.sentences if not any(w in s.lower() for w in words)]
    draft.answer = " ".join(lines) or "All right."


def few_sentences(p: Pieces, draft: Draft) -> None:
    """Require fewer than n sentences."""
    n = p.between(2, 6)
    draft.rule("fewsent", n, n=n)
    draft.answer = " ".join(draft.retopic(p.between(1, n - 1)))


def many_sentences(p: Pieces, draft: Draft) -> None:
    """Require at least n sentences."""
    n = p.between(2, 8)
    draft.rule("manysent", n, n=n)
    draft.answer = " ".join(draft.retopic(n + p.between(0, 1)))


def at_least(p: Pieces, draft: Draft) -> None:
    """Require at least n words."""
    n = p.choice([20, 30, 40, 50, 80, 100, 150])
    draft.rule("atleast", n, n=n)
    lines = draft.retopic(min(22, n // 7 + 2))
    while sum(len(s.split()) for s in lines) < n:
        lines = draft.retopic(24)
    draft.answer = " ".join(lines)


def few_words(p: Pieces, draft: Draft) -> None:
    """Require fewer than n words."""
    n = p.choice([20, 30, 40, 50, 80, 100])
    draft.rule("fewwords", n, n=n)
    kept: list[str] = []
    for line in draft.retopic(6):
        if len(" ".join([*kept, line]).split()) < n:
            kept.append(line)
    draft.answer = " ".join(kept) or "All right."


def bullets(p: Pieces, draft: Draft) -> None:
    """Require exactly n bullet points, of tips or of essay sentences."""
    n = p.between(2, 6)
    if p.chance(0.6):
        key, tips = how_to(p)
        n = min(n, len(tips))
        draft.request = p.say(talk.how_to_requests, k=key)
        lines = p.ordered(tips, n)
        if p.chance(0.3):
            draft.request = f"Give me exactly {n} bullet points on how to {key}."
    else:
        lines = draft.retopic(n)
    draft.rule("bullets", n, n=n)
    draft.answer = "\n".join("* " + x for x in lines)


def json_text(keys: Sequence[str], values: Sequence[str]) -> str:
    """Return a JSON object as an answer shows it."""
    return json.dumps(dict(zip(keys, values, strict=False)), indent=2, ensure_ascii=False)


def json_format(p: Pieces, draft: Draft) -> None:
    """Require a JSON object with three keys, at times named in the request."""
    topic, keys = p.topic(), ["topic", "text", "note"]
    draft.request = essay_request(p, topic)
    draft.rule("json")
    if p.chance(0.25):
        keys = p.sample(["name", "text", "title", "summary", "info", p.word(), p.word()], 3)
        draft.rules[-1] += f' Use the keys "{keys[0]}", "{keys[1]}" and "{keys[2]}".'
    elif p.chance(0.4):
        draft.request, draft.rules[-1] = f"Tell me about {topic.text} in JSON format.", ""
    values = [topic.text, *essay(p, topic, 2, opener=False)]
    body = json_text(list(dict.fromkeys(keys)), values)
    draft.answer = "```json\n" + body + "\n```" if "ticks" in draft.rules[-1] else body


def title(p: Pieces, draft: Draft) -> None:
    """Require a title in double angle brackets above the answer."""
    words = p.say(wordings["title_words"])
    draft.rule("title")
    draft.answer = f"<<{words}>>\n\n{draft.text()}"


def postscript(p: Pieces, draft: Draft) -> None:
    """Require a postscript with a given mark."""
    mark = p.choice(["P.S.", "P.P.S"])
    draft.rule("ps", mark, mark=mark)
    draft.answer = f"{draft.text()}\n\n{mark} {p.say(wordings['ps_line'])}"


def blank_lines(names: Sequence[str]) -> list[str]:
    """Return sentences with blanks in square brackets."""
    return [
        f"Please write to [{x}]." if i % 2 else f"The {x} is [{x}]." for i, x in enumerate(names)
    ]


def placeholders(p: Pieces, draft: Draft) -> None:
    """Require at least n blanks in square brackets."""
    n = p.between(1, 5)
    draft.rule("placeholders", n, n=n)
    draft.answer = draft.text(*blank_lines(p.ordered(content.blanks[:10], n)))


def highlight(p: Pieces, draft: Draft) -> None:
    """Require at least n parts between asterisks."""
    n = p.between(1, 4)
    draft.rule("highlight", n, n=n)
    lines = list(draft.sentences)
    if len(lines) < n:
        lines = list(draft.retopic(n + 1))
    for i in range(n):
        words = lines[i].split(" ")
        first = min(len(words) - 1, 1)
        last = min(len(words) - 1, first + p.between(0, 2))
        words[first] = "*" + words[first]
        words[last] += "*"
        lines[i] = " ".join(words)
    draft.answer = " ".join(lines)


def paragraphs(p: Pieces, draft: Draft) -> None:
    """Require exactly n paragraphs around the divider ***."""
    n = p.between(2, 5)
    draft.rule("paragraphs", n, n=n)
    draft.answer = "\n\n***\n\n".join(draft.essay_parts(n, p.between(1, 2)))


def first_word(p: Pieces, draft: Draft) -> None:
    """Require n paragraphs, one of which starts with a given word."""
    n = p.between(2, 4)
    which = p.between(1, n)
    ordinal = ["first", "second", "third", "fourth"][which - 1]
    word = p.say(wordings["first_words"])
    draft.rule("firstword", (n, which, word), n=n, x=which, i=ordinal, w=word)
    parts = draft.essay_parts(n, 1)
    parts[which - 1] = f"{word}, {parts[which - 1]}"
    draft.answer = "\n\n".join(parts)


def sections(p: Pieces, draft: Draft) -> None:
    """Require n numbered sections with a given mark."""
    n, mark = p.between(2, 4), p.choice(["Section", "SECTION", "Part", "PARAGRAPH"])
    draft.rule("sections", (mark, n), n=n, mark=mark)
    parts = draft.essay_parts(n, p.between(1, 2))
    draft.answer = "\n\n".join(f"{mark} {i + 1}\n{x}" for i, x in enumerate(parts))


def two_answers(p: Pieces, draft: Draft) -> None:
    """Return two different answers around six asterisks, with different openings."""
    topic = p.topic()
    draft.request = essay_request(p, topic)
    draft.rule("two")
    n, m = p.between(1, 3), p.between(1, 3)
    lines = essay(p, topic, n + m)
    second = [f"Here is another view of {topic.text}.", *lines[n:]]
    draft.answer = " ".join(lines[:n]) + "\n\n******\n\n" + " ".join(second)


# those that stand twice are drawn twice as often
FORMS: tuple[Callable[[Pieces, Draft], None], ...] = (
    *(bullets, bullets, end_phrase, end_phrase, json_format, json_format, title, postscript),
    *(placeholders, highlight, paragraphs, first_word, sections, keywords, keywords, frequency),
    *(forbidden, two_answers, few_sentences, many_sentences, at_least, few_words),
)
