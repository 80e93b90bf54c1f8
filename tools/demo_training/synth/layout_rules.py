"""Rules on the layout of an answer: lists, JSON, titles, paragraphs, sections."""

from __future__ import annotations

import json

from . import tables as t
from .draft import Draft, essay_parts, retopic
from .pieces import Pieces
from .prose import ESSAY_REQUESTS, essay
from .talk import HOW_TO_REQUESTS, how_to


def bullets(p: Pieces, draft: Draft) -> None:
    """Exactly n bullet points, of tips or of essay sentences."""
    n = p.between(2, 6)
    if p.chance(0.6):
        key, tips = how_to(p)
        n = min(n, len(tips))
        draft.request = p.choice(HOW_TO_REQUESTS).format(k=key)
        lines = p.ordered(tips, n)
        if p.chance(0.3):
            draft.request = f"Give me exactly {n} bullet points on how to {key}."
    else:
        lines = retopic(p, draft, n)
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


def json_format(p: Pieces, draft: Draft) -> None:
    """A JSON object with three keys, at times named in the request."""
    topic = p.topic()
    draft.request = p.choice(ESSAY_REQUESTS).format(t=topic.text)
    keys = ["topic", "text", "note"]
    rule = p.choice(
        [
            "Your whole answer should be in JSON format.",
            "Give the entire output as JSON.",
            "Answer with valid JSON only.",
            "Answer in JSON format.",
            "Put all of the output into JSON. It may stand in markdown ticks (```).",
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
    """A title in double angle brackets above the answer."""
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
    """A postscript with a given mark."""
    mark = p.choice(["P.S.", "P.P.S"])
    rule = p.choice(
        [
            f"Below your answer, add a postscript, and begin it with {mark}",
            f"At the bottom of it, add a postscript opened by {mark}",
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
    """At least n blanks in square brackets."""
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
    """At least n parts between asterisks."""
    n = p.between(1, 4)
    rule = p.choice(
        [
            f"Mark at least {n} parts of your answer with markdown, like *this part*.",
            f"Highlight at least {n} parts with markdown, i.e. *highlighted part*.",
        ]
    )
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
    rule = p.choice(
        [
            f"Make it {n} paragraphs with the markdown divider *** between them.",
            f"Write exactly {n} paragraphs, separated by a markdown divider: ***",
            f"There should be {n} paragraphs. Separate them with ***.",
        ]
    )
    parts = essay_parts(p, draft, n, p.between(1, 2))
    draft.keep("\n\n***\n\n".join(parts), rule, "paragraphs", n)


def first_word(p: Pieces, draft: Draft) -> None:
    """n paragraphs, one of which starts with a given word."""
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
    parts = essay_parts(p, draft, n, 1)
    parts[which - 1] = f"{word}, {parts[which - 1]}"
    draft.keep("\n\n".join(parts), rule, "firstword", (n, which, word))


def sections(p: Pieces, draft: Draft) -> None:
    """n numbered sections with a given mark."""
    n, mark = p.between(2, 4), p.choice(["Section", "SECTION", "Part", "PARAGRAPH"])
    rule = p.choice(
        [
            f"Your answer must have {n} sections. Put {mark} X where a section begins, "
            f"such as:\n{mark} 1\n[content of section 1]\n{mark} 2\n[content of section 2]",
            f"Use {n} sections, each starting with {mark} and its number.",
        ]
    )
    parts = essay_parts(p, draft, n, p.between(1, 2))
    text = "\n\n".join(f"{mark} {i + 1}\n{x}" for i, x in enumerate(parts))
    draft.keep(text, rule, "sections", (mark, n))


def two_answers(p: Pieces, draft: Draft) -> None:
    """Two different answers around six asterisks; the second has an opening of its own."""
    topic = p.topic()
    draft.request = p.choice(ESSAY_REQUESTS).format(t=topic.text)
    rule = p.choice(
        [
            "Give two different answers with six asterisks ****** between them.",
            "Write two responses that differ, and 6 asterisks between them: ******",
        ]
    )
    n, m = p.between(1, 3), p.between(1, 3)
    lines = essay(p, topic, n + m)
    second = [f"Here is another view of {topic.text}.", *lines[n:]]
    draft.keep(" ".join(lines[:n]) + "\n\n******\n\n" + " ".join(second), rule, "two")
