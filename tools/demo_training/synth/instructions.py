"""Requests with one to three verifiable constraints, and requests that must be repeated first."""

from __future__ import annotations

from typing import NamedTuple

from ..tables import words
from .checks import CHOICES
from .pieces import Pieces
from .prose import plain_request
from .questions import fact
from .short_rules import CASE_CHANGES, FORMS, Checks, Draft, wordings

# which may be followed by a rule on every letter, and by which
WITH_ANY_CASE = {"bullets", "title", "paragraphs", "highlight", "two", "atleast", "fewsent"}
WITH_NO_COMMA = {"ps", "sections", "keywords", "manysent", "fewwords", "frequency"}


class Instruction(NamedTuple):
    """A request, an answer that keeps its rules, and the checks [(kind, arg)]."""

    request: str
    answer: str
    checks: Checks


def _say(p: Pieces, draft: Draft) -> str:
    """Return the request and its rules in one text: after it, before it, or as a list."""
    request, rules = draft.request, [r for r in draft.rules if r]
    if p.chance(0.2):
        request = p.say(wordings["leads"], q=request)
    if not rules:
        return request
    r = p.random.random()
    if r < 0.12:
        head = p.choice(["\nRules:\n", "\n\nFollow these rules:\n"])
        return request + head + "\n".join("- " + x for x in rules)
    if r < 0.25:
        return " ".join(rules) + " " + request
    return request + p.choice([" ", " ", " ", "\n", "\n\n"]) + " ".join(rules)


def repeat_first(p: Pieces) -> Instruction:
    """Ask to repeat the request (or a sentence of the texts) word for word before the answer."""
    r = p.random.random()
    if r < 0.25:
        question, answer = p.choice(p.sources.problems)
        text = question[:400].strip()
        answer = "The answer is " + answer.split("#### ")[-1].strip() + "."
    elif r < 0.5:
        text = p.sentence().strip()
        answer = p.choice(wordings["repeat_answers"])
    elif r < 0.75:
        text, answer = fact(p)
    else:
        text, sentences = plain_request(p)
        answer = " ".join(sentences)
    request = p.say(wordings["repeat"], q=text)
    return Instruction(request, f"{text}\n\n{answer}", [("repeat", text)])


def choose(p: Pieces) -> Instruction:
    """Return a yes-no question with three allowed answers."""
    kind = p.mixed([[0.2, "maybe"], [0.5, "no"], [1, "yes"]])
    question = p.say(wordings["choices"][kind], x=p.choice(list(words.animals)))
    said = dict(zip(("yes", "no", "maybe"), CHOICES, strict=True))
    options = p.say(wordings["choice_options"], y=CHOICES[0], n=CHOICES[1], m=CHOICES[2])
    checks: Checks = [("choice", None), ("equals", said[kind])]
    return Instruction(f"{question} {options}", said[kind], checks)


def instruction(p: Pieces) -> Instruction:
    """Return a request with constraints, and an answer that passes `check` for each."""
    r = p.random.random()
    if r < 0.07:
        return repeat_first(p)
    if r < 0.11:
        return choose(p)
    draft = Draft(p)
    if r < 0.30:
        kind = p.choice(list(CASE_CHANGES))
        draft.whole_text(kind)
        if kind in ("lower", "upper") and p.chance(0.15):
            draft.whole_text("nocomma")
    else:
        p.choice(FORMS)(p, draft)
        kind = draft.checks[0][0]
        if p.chance(0.35):
            if kind in WITH_ANY_CASE:
                draft.whole_text(p.choice(["lower", "upper", "nocomma"]))
            elif kind in WITH_NO_COMMA:
                draft.whole_text("nocomma")
    return Instruction(_say(p, draft), draft.answer, draft.checks)
