"""Long-winded requests with one to three rules that stand anywhere in them."""

from __future__ import annotations

import re

from ..tables import load
from .checks import CHOICES, check
from .instructions import Instruction
from .long_rules import CONTENT
from .page import Page, cut
from .pieces import Pieces, Topic, upper_first
from .prose import long_essay
from .refusals import refusal
from .short_rules import CASE_CHANGES, content
from .wordy import Wish, requests, wish

rules = load("long_rules")
# those from 700 on only fit into long rows
WORD_COUNTS = (20, 30, 40, 50, 60, 80, 100, 120, 150, 150, 200, 200, 250, 300, 300, 350, 400)
WORD_COUNTS += (450, 500, 600, 600, 700, 800, 900)
# rules of each group with how often they are drawn
FORMS = {"bullets": 6, "paragraphs": 6, "firstword": 3.5, "sections": 4, "two": 5, "json": 6}
LENGTHS = {"manysent": 3, "fewsent": 3, "atleast": 5, "fewwords": 2.5}
WHOLE = {"lower": 4, "upper": 3, "nocomma": 6, "quote": 4}
GROUPS = {"form": 26, "length": 16, "content": 34, "frame": 14, "whole": 24}
# what cannot stand together: the first would break the second
CLASHES = (
    {"lower", "capwords"},
    {"upper", "fewcaps"},
    {"highlight", "capwords"},
    {"quote", "json"},
    {"fewletter", "letter"},
)
ALONE = {"fewletter"}  # next to nothing else is possible
OF_JSON = {"keywords", "lower", "upper", "json"}
NO_FRAME = {"json", "firstword"}  # a title or a postscript would break them


def weighted(p: Pieces, table: dict):
    """Return a random key of a table of weights."""
    return p.random.choices(list(table), list(table.values()))[0]


def number(p: Pieces, n: int) -> str:
    """Return a count in digits, at times as a word."""
    return content.numbers[n] if n < len(content.numbers) and p.chance(0.2) else str(n)


def _sentences(p: Pieces, page_wish: Wish, length: str) -> tuple[list[str], int]:
    """Return sentences that keep a rule on length ("" = none), and its number."""
    if length == "manysent":
        n = p.choice([2, 3, 4, 5, 5, 6, 8, 10, 12, 15, 17, 20, 25, 30, 40, 50])
        return page_wish.sentences(p, n + p.between(1, 2)), n
    if length == "fewsent":
        n = p.choice([2, 3, 4, 5, 6, 8, 10, 15, 20, 30])
        return page_wish.sentences(p, p.between(1, min(n - 1, 6))), n
    if length == "atleast":
        n = p.choice(WORD_COUNTS)
        return _until(p, page_wish, round(n * 1.12) + 5), n
    if length == "fewwords":
        n = p.choice([10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 600])
        kept: list[str] = []
        for line in page_wish.sentences(p, p.between(1, 6)):
            if sum(len(s.split()) for s in (*kept, line)) < n * 0.9:
                kept.append(line)
        return kept or ["All right."], n
    return page_wish.sentences(p, p.choice([1, 2, 3, 3, 4, 4, 5, 6, 8])), 0


def _until(p: Pieces, page_wish: Wish, words: int) -> list[str]:
    """Return sentences of at least this many words together."""
    count = max(2, words // 11)
    while True:
        found = page_wish.sentences(p, count)
        if sum(len(s.split()) for s in found) >= words or count > 84:
            return found
        count += max(1, count // 10)


def _form(p: Pieces, page: Page, form: str, sentences: list[str], own_length: bool) -> None:
    """Cut the sentences into the blocks of a form and says its rule."""
    n = p.choice([2, 2, 3, 3, 4, 5, 6])
    if form == "bullets":
        n = p.choice([1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 10])
    n = 2 if form == "two" else n
    if len(sentences) < n or not own_length:
        per = 1 if form in ("bullets", "json") else p.choice([1, 1, 2, 2, 3])
        wanted = max(n * per, len(sentences) if own_length else 0)
        sentences = long_essay(p, page.topic, wanted) if wanted > 1 else sentences[:1]
    page.form, page.blocks = form, cut(sentences, n)
    if form == "two":
        page.blocks[1].insert(0, f"Here is another view of {page.topic.text}.")
        page.keep("two")
    elif form == "json":
        page.blocks = cut(sentences[:3], min(3, len(sentences)))
        page.keep("json")
    elif form == "firstword":
        i = p.between(1, n)
        word = p.choice(["First", "Now", "Still", "Today", "However", p.word(), p.word(), p.word()])
        word = word.capitalize() if p.chance(0.5) else word
        page.blocks[i - 1][0] = f"{word}, {page.blocks[i - 1][0]}"
        page.keep(form, (n, i, word), n=number(p, n), i=content.ordinals[i - 1], x=i, w=word)
    elif form == "sections":
        page.mark = p.choice(content.marks) if p.chance(0.85) else p.word().capitalize()
        page.keep(form, (page.mark, n), n=number(p, n), mark=page.mark)
    else:
        page.keep(form, n, n=number(p, n))


def _frame(p: Pieces, page: Page) -> None:
    """Add a title, a postscript or a last phrase."""
    r = p.random.random()
    if r < 0.4:
        page.title = upper_first(page.topic.text) if p.chance(0.8) else p.phrase().title()
        page.keep("title")
    elif r < 0.65:
        mark = p.choice(["P.S.", "P.P.S"])
        page.last = f"\n\n{mark} {p.choice(content.ps_lines)}"
        page.keep("ps", mark, mark=mark)
    else:
        phrase = p.choice(content.end_phrases) if p.chance(0.4) else _end_phrase(p)
        page.last = " " + phrase
        page.keep("end", phrase, phrase=phrase)


def _end_phrase(p: Pieces) -> str:
    r = p.random.random()
    if r < 0.4:
        return upper_first(p.phrase()) + p.choice([".", "!", "?"])
    if r < 0.7:
        return f"{upper_first(p.word())} {p.word()} {p.word()}{p.choice(['.', '!', '?', ''])}"
    return p.sentence()[:90].strip()


def _kinds(p: Pieces) -> set[str]:
    """Choose the groups of rules of a request: one to three, most often one."""
    count = p.choice([1, 1, 1, 2, 2, 3])
    found: set[str] = set()
    while len(found) < count:
        found.add(weighted(p, GROUPS))
    return found


def _ruled_wish(p: Pieces) -> Wish:
    """Return a request to which rules are added.

    Some are requests that the model refuses without a rule. Under a rule it writes a text instead,
    because a refusal keeps few rules.
    """
    if p.chance(0.12):
        request, _ = refusal(p)
        return Wish(request, Topic("this question"))
    return wish(p)


def _draw(p: Pieces) -> tuple[Wish, Page]:
    """Return a wish and a page that is meant to keep its rules."""
    asked, groups = _ruled_wish(p), _kinds(p)
    length = weighted(p, LENGTHS) if "length" in groups else ""
    sentences, n = _sentences(p, asked, length)
    page = Page(asked.topic, [list(sentences)])
    if length:
        page.keep(length, n, n=number(p, n), m=n - 1)
    if "form" in groups:
        _form(p, page, weighted(p, FORMS), sentences, bool(length))
    if "content" in groups:
        weighted(p, CONTENT)(p, page)
        if len(groups) == 1 and p.chance(0.3):
            weighted(p, CONTENT)(p, page)
    if "frame" in groups and page.form not in NO_FRAME:
        _frame(p, page)
    if "whole" in groups:
        kind = weighted(p, WHOLE)
        page.letters.append(CASE_CHANGES[kind])
        page.keep(kind)
    return asked, page


def _possible(page: Page, answer: str) -> bool:
    """Return True if the rules fit together and the answer keeps them all."""
    kinds = [kind for kind, _ in page.checks]
    together = set(kinds)
    if not kinds or len(together) < len(kinds):
        return False
    if any(clash <= together for clash in CLASHES) or (together & ALONE and len(kinds) > 1):
        return False
    if "json" in together and not together <= OF_JSON:
        return False
    return all(check(kind, arg, answer) for kind, arg in page.checks)


def vary(p: Pieces, wording: str) -> str:
    """Return a wording of a rule in which some words are exchanged for equivalent ones."""
    for pattern, words in rules.swaps:
        if p.chance(0.4):
            wording = re.sub(pattern, p.choice(words), wording, count=1)
    if p.chance(0.08):
        wording = re.sub(rules.emphasis, lambda m: m[0].upper(), wording, count=1)
    return wording


def say(p: Pieces, kind: str, fields: dict[str, str]) -> str:
    """Return a wording of a rule as a sentence."""
    if p.chance(0.5):
        return vary(p, p.choice(rules.sentences[kind])).format(**fields)
    text = vary(p, p.choice(rules.imperatives[kind])).format(**fields)
    said = upper_first(p.choice(rules.starts).format(r=text))
    return said[:-1] if said.endswith(("..", "?.", "!.")) else said


def request_text(p: Pieces, request: str, said: list[str]) -> str:
    """Return the request and its rules: after it, before it, around it, or as a list."""
    r = p.random.random()
    if r < 0.08:
        head = p.choice(requests.heads)
        mark = p.choice(["- ", "* ", ""])
        lines = [(mark or f"{i + 1}. ") + x for i, x in enumerate(said)]
        return f"{request}\n\n{head}\n" + "\n".join(lines)
    if r < 0.2:
        return " ".join(said) + p.choice([" ", "\n", "\n\n"]) + request
    if r < 0.3 and len(said) > 1:
        return " ".join([said[0], request, *said[1:]])
    if r < 0.4 and ". " in request:
        first, rest = request.split(". ", 1)
        return f"{first}. {' '.join(said)} {rest}"
    return request + p.choice([" ", " ", " ", "\n", "\n\n"]) + " ".join(said)


def assignment(p: Pieces) -> Instruction:
    """Return a wordy request with rules, and an answer that passes `check` for each rule."""
    while True:
        asked, page = _draw(p)
        answer = page.text()
        if _possible(page, answer):
            break
    said = [say(p, kind, fields) for kind, fields in page.said]
    p.random.shuffle(said)
    return Instruction(request_text(p, asked.request, said), answer, page.checks)


def repeat_wish(p: Pieces) -> Instruction:
    """Return a wordy request that is to be repeated word for word before the answer."""
    inner = wish(p)
    text, sentences = inner.request, inner.sentences(p, p.choice([1, 2, 3, 4]))
    if p.chance(0.25):
        text, sentences = p.choice(p.sources.instructions)
        text, sentences = text[:700], [sentences[:300]]
    elif p.chance(0.2):
        text, sentences = p.choice(p.sources.problems)
        sentences = ["The answer is " + sentences.split("#### ")[-1].strip() + "."]
    text = text.strip()
    request = p.say(requests.repeat, q=text)
    return Instruction(request, f"{text}\n\n{' '.join(sentences)}", [("repeat", text)])


def language_wish(p: Pieces) -> Instruction:
    """Return a request to be answered in another language: one short text for each."""
    name, text = p.item(requests.languages)
    inner = wish(p)
    said = [say(p, "language", {"l": name})]
    return Instruction(request_text(p, inner.request, said), text, [("equals", text)])


def choice_wish(p: Pieces) -> Instruction:
    """Return a question with three allowed answers. The third is for an unknown fact."""
    fields = {"t": p.draw("topic"), "w": p.word(), "n": p.name(), "d": p.choice(["soon", "today"])}
    question = p.say(requests.choice_questions, **fields)
    if p.chance(0.5):
        question = wish(p).request
    yes, no, maybe = CHOICES
    options = p.say(requests.choice_options, y=yes, n=no, m=maybe)
    return Instruction(f"{question} {options}", maybe, [("choice", None), ("equals", maybe)])


def open_wish(p: Pieces) -> Instruction:
    """Return a wordy request without a rule."""
    asked = wish(p)
    sentences = asked.sentences(p, p.between(2, 8))
    groups = cut(sentences, 2) if len(sentences) > 5 and p.chance(0.3) else [sentences]
    return Instruction(asked.request, "\n\n".join(" ".join(g) for g in groups), [])


def assigned(p: Pieces) -> Instruction:
    """Return any wordy request."""
    r = p.random.random()
    if r < 0.70:
        return assignment(p)
    if r < 0.80:
        return repeat_wish(p)
    if r < 0.86:
        return language_wish(p)
    if r < 0.89:
        return choice_wish(p)
    return open_wish(p)
