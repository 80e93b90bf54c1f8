"""The rules of short requests: each changes a request in the making so that its answer keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tables import load
from .pieces import Pieces
from .prose import essay, essay_request
from .talk import how_to, talk

Checks = list[tuple[str, Any]]
wordings = vars(load("short_rules"))
content = load("content")


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


def retopic(p: Pieces, draft: Draft, count: int) -> list[str]:
    """Replaces the request by one for an essay of `count` sentences; returns them."""
    topic = p.topic()
    draft.request = essay_request(p, topic)
    draft.sentences = essay(p, topic, count)
    return draft.sentences


def essay_parts(p: Pieces, draft: Draft, count: int, per_part: int = 2) -> list[str]:
    """The text of `count` parts of one essay, without a repeated sentence."""
    lines = retopic(p, draft, count * per_part)
    groups = [lines[i * per_part : (i + 1) * per_part] for i in range(count)]
    return [" ".join(g) for g in groups]


CASE_CHANGES: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "nocomma": lambda text: text.replace(",", ""),
    "quote": lambda text: '"' + text.replace('"', "'") + '"',
}


def whole_text(p: Pieces, draft: Draft, kind: str) -> None:
    """Rules on every letter: lower, upper, nocomma, quote. May follow another rule."""
    text = draft.answer or " ".join(draft.sentences)
    draft.keep(CASE_CHANGES[kind](text), p.choice(wordings[kind]), kind)


def end_phrase(p: Pieces, draft: Draft) -> None:
    """The answer ends with a given phrase."""
    phrase = p.say(wordings["end_phrase"])
    rule = p.say(wordings["end"], phrase=phrase)
    draft.keep(" ".join(draft.sentences) + " " + phrase, rule, "end", phrase)


def keywords(p: Pieces, draft: Draft) -> None:
    """One to three words, in the order asked and side by side: greedy text knows the next."""
    words = [p.word() for _ in range(p.between(1, 3))]
    rule = p.say(wordings["keywords"], k=", ".join(words))
    lines = [content.keyword_lines[i % 3].format(k=k) for i, k in enumerate(words)]
    text = " ".join([draft.sentences[0], *lines, *draft.sentences[1:]])
    draft.keep(text, rule, "keywords", words)


def frequency(p: Pieces, draft: Draft) -> None:
    """A word occurs at least n times."""
    word, n = p.word(), p.between(2, 4)
    rule = p.say(wordings["frequency"], w=word, n=n)
    lines = [x.format(k=word) for x in content.again_lines[:n]]
    draft.keep(" ".join([*draft.sentences, *lines]), rule, "frequency", (word, n))


def forbidden(p: Pieces, draft: Draft) -> None:
    """One to three words do not occur."""
    words = [p.word() for _ in range(p.between(1, 3))]
    rule = p.say(wordings["forbidden"], k=", ".join(words))
    lines = [s for s in draft.sentences if not any(w in s.lower() for w in words)]
    draft.keep(" ".join(lines) or "All right.", rule, "forbidden", words)


def few_sentences(p: Pieces, draft: Draft) -> None:
    """Fewer than n sentences."""
    n = p.between(2, 6)
    rule = p.say(wordings["fewsent"], n=n)
    draft.keep(" ".join(retopic(p, draft, p.between(1, n - 1))), rule, "fewsent", n)


def many_sentences(p: Pieces, draft: Draft) -> None:
    """At least n sentences."""
    n = p.between(2, 8)
    rule = p.say(wordings["manysent"], n=n)
    draft.keep(" ".join(retopic(p, draft, n + p.between(0, 1))), rule, "manysent", n)


def at_least(p: Pieces, draft: Draft) -> None:
    """At least n words."""
    n = p.choice([20, 30, 40, 50, 80, 100, 150])
    rule = p.say(wordings["atleast"], n=n)
    lines = retopic(p, draft, min(22, n // 7 + 2))
    while sum(len(s.split()) for s in lines) < n:
        lines = retopic(p, draft, 24)
    draft.keep(" ".join(lines), rule, "atleast", n)


def few_words(p: Pieces, draft: Draft) -> None:
    """Fewer than n words."""
    n = p.choice([20, 30, 40, 50, 80, 100])
    rule = p.say(wordings["fewwords"], n=n)
    kept: list[str] = []
    for line in retopic(p, draft, 6):
        if len(" ".join([*kept, line]).split()) < n:
            kept.append(line)
    draft.keep(" ".join(kept) or "All right.", rule, "fewwords", n)


def bullets(p: Pieces, draft: Draft) -> None:
    """Exactly n bullet points, of tips or of essay sentences."""
    n = p.between(2, 6)
    if p.chance(0.6):
        key, tips = how_to(p)
        n = min(n, len(tips))
        draft.request = p.say(talk.how_to_requests, k=key)
        lines = p.ordered(tips, n)
        if p.chance(0.3):
            draft.request = f"Give me exactly {n} bullet points on how to {key}."
    else:
        lines = retopic(p, draft, n)
    rule = p.say(wordings["bullets"], n=n)
    draft.keep("\n".join("* " + x for x in lines), rule, "bullets", n)


def json_text(keys: Sequence[str], values: Sequence[str]) -> str:
    """A JSON object as an answer shows it."""
    return json.dumps(dict(zip(keys, values, strict=False)), indent=2, ensure_ascii=False)


def json_format(p: Pieces, draft: Draft) -> None:
    """A JSON object with three keys, at times named in the request."""
    topic = p.topic()
    draft.request = essay_request(p, topic)
    keys = ["topic", "text", "note"]
    rule = p.choice(wordings["json"])
    if p.chance(0.25):
        keys = p.sample(["name", "text", "title", "summary", "info", p.word(), p.word()], 3)
        rule += f' Use the keys "{keys[0]}", "{keys[1]}" and "{keys[2]}".'
    elif p.chance(0.4):
        draft.request, rule = f"Tell me about {topic.text} in JSON format.", ""
    values = [topic.text, *essay(p, topic, 2, opener=False)]
    body = json_text(list(dict.fromkeys(keys)), values)
    draft.keep("```json\n" + body + "\n```" if "ticks" in rule else body, rule, "json")


def title(p: Pieces, draft: Draft) -> None:
    """A title in double angle brackets above the answer."""
    words = p.say(wordings["title_words"])
    rule = p.choice(wordings["title"])
    draft.keep(f"<<{words}>>\n\n" + " ".join(draft.sentences), rule, "title")


def postscript(p: Pieces, draft: Draft) -> None:
    """A postscript with a given mark."""
    mark = p.choice(["P.S.", "P.P.S"])
    rule = p.say(wordings["ps"], mark=mark)
    last = p.say(wordings["ps_line"])
    draft.keep(" ".join(draft.sentences) + f"\n\n{mark} {last}", rule, "ps", mark)


def blank_lines(names: Sequence[str]) -> list[str]:
    """Sentences with blanks in square brackets."""
    return [
        f"Please write to [{x}]." if i % 2 else f"The {x} is [{x}]." for i, x in enumerate(names)
    ]


def placeholders(p: Pieces, draft: Draft) -> None:
    """At least n blanks in square brackets."""
    n = p.between(1, 5)
    rule = p.say(wordings["placeholders"], n=n)
    ends = blank_lines(p.ordered(content.blanks[:10], n))
    draft.keep(" ".join([*draft.sentences, *ends]), rule, "placeholders", n)


def highlight(p: Pieces, draft: Draft) -> None:
    """At least n parts between asterisks."""
    n = p.between(1, 4)
    rule = p.say(wordings["highlight"], n=n)
    lines = list(draft.sentences)
    if len(lines) < n:
        lines = list(retopic(p, draft, n + 1))
    for i in range(n):
        words = lines[i].split(" ")
        first = min(len(words) - 1, 1)
        last = min(len(words) - 1, first + p.between(0, 2))
        words[first] = "*" + words[first]
        words[last] += "*"
        lines[i] = " ".join(words)
    draft.keep(" ".join(lines), rule, "highlight", n)


def paragraphs(p: Pieces, draft: Draft) -> None:
    """Exactly n paragraphs around the divider ***."""
    n = p.between(2, 5)
    rule = p.say(wordings["paragraphs"], n=n)
    parts = essay_parts(p, draft, n, p.between(1, 2))
    draft.keep("\n\n***\n\n".join(parts), rule, "paragraphs", n)


def first_word(p: Pieces, draft: Draft) -> None:
    """n paragraphs, one of which starts with a given word."""
    n = p.between(2, 4)
    which = p.between(1, n)
    ordinal = ["first", "second", "third", "fourth"][which - 1]
    word = p.say(wordings["first_words"])
    rule = p.say(wordings["firstword"], n=n, x=which, i=ordinal, w=word)
    parts = essay_parts(p, draft, n, 1)
    parts[which - 1] = f"{word}, {parts[which - 1]}"
    draft.keep("\n\n".join(parts), rule, "firstword", (n, which, word))


def sections(p: Pieces, draft: Draft) -> None:
    """n numbered sections with a given mark."""
    n, mark = p.between(2, 4), p.choice(["Section", "SECTION", "Part", "PARAGRAPH"])
    rule = p.say(wordings["sections"], n=n, mark=mark)
    parts = essay_parts(p, draft, n, p.between(1, 2))
    text = "\n\n".join(f"{mark} {i + 1}\n{x}" for i, x in enumerate(parts))
    draft.keep(text, rule, "sections", (mark, n))


def two_answers(p: Pieces, draft: Draft) -> None:
    """Two different answers around six asterisks; the second has an opening of its own."""
    topic = p.topic()
    draft.request = essay_request(p, topic)
    rule = p.choice(wordings["two"])
    n, m = p.between(1, 3), p.between(1, 3)
    lines = essay(p, topic, n + m)
    second = [f"Here is another view of {topic.text}.", *lines[n:]]
    draft.keep(" ".join(lines[:n]) + "\n\n******\n\n" + " ".join(second), rule, "two")


# those that stand twice are drawn twice as often
FORMS: tuple[Callable[[Pieces, Draft], None], ...] = (
    *(bullets, bullets, end_phrase, end_phrase, json_format, json_format, title, postscript),
    *(placeholders, highlight, paragraphs, first_word, sections, keywords, keywords, frequency),
    *(forbidden, two_answers, few_sentences, many_sentences, at_least, few_words),
)
