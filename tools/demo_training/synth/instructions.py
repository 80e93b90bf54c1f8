"""Requests with one to three verifiable constraints, and requests that must be repeated first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import layout_rules, word_rules
from . import tables as t
from .checks import CHOICES
from .draft import Checks, Draft
from .pieces import Pieces, article
from .prose import plain_request
from .questions import fact
from .word_rules import CASE_CHANGES, whole_text

# longer lead-ins, as people write them
LEADS = [
    "I have to hand in a text tomorrow and I am a little late. {q}",
    "We are preparing a small event for our friends next week. {q}",
    "Hello! I hope you can help me with this. {q}",
    "My teacher gave me this task and I do not know how to begin. {q}",
    "I am working on a small website for my family. {q}",
    "For a project at school I need some help. {q}",
    "You are an experienced writer. {q}",
    "I am new here and I want to try something. {q}",
    "My friend asked me for this and I want to surprise my friend. {q}",
    "Imagine that you are speaking to a group of young people. {q}",
]

FORMS: tuple[Callable[[Pieces, Draft], None], ...] = (
    layout_rules.bullets,
    layout_rules.bullets,
    word_rules.end_phrase,
    word_rules.end_phrase,
    layout_rules.json_format,
    layout_rules.json_format,
    layout_rules.title,
    layout_rules.postscript,
    layout_rules.placeholders,
    layout_rules.highlight,
    layout_rules.paragraphs,
    layout_rules.first_word,
    layout_rules.sections,
    word_rules.keywords,
    word_rules.keywords,
    word_rules.frequency,
    word_rules.forbidden,
    layout_rules.two_answers,
    word_rules.few_sentences,
    word_rules.many_sentences,
    word_rules.at_least,
    word_rules.few_words,
)
# which may be followed by a rule on every letter, and by which
WITH_ANY_CASE = {"bullets", "title", "paragraphs", "highlight", "two", "atleast", "fewsent"}
WITH_NO_COMMA = {"ps", "sections", "keywords", "manysent", "fewwords", "frequency"}


@dataclass(frozen=True)
class Instruction:
    """A request, an answer that keeps its rules, and the checks [(kind, arg)]."""

    request: str
    answer: str
    checks: Checks


def _say(p: Pieces, draft: Draft) -> str:
    """The request and its rules in one text: after it, before it, or as a list."""
    request, rules = draft.request, [r for r in draft.rules if r]
    if p.chance(0.2):
        request = p.choice(LEADS).format(q=request)
    if not rules:
        return request
    r = p.random.random()
    if r < 0.12:
        return (
            request
            + p.choice(["\nRules:\n", "\n\nFollow these rules:\n"])
            + "\n".join("- " + x for x in rules)
        )
    if r < 0.25:
        return " ".join(rules) + " " + request
    return request + p.choice([" ", " ", " ", "\n", "\n\n"]) + " ".join(rules)


def repeat_first(p: Pieces) -> Instruction:
    """The request (or a sentence of the texts) must be repeated word for word, then answered."""
    r = p.random.random()
    if r < 0.25:
        question, answer = p.choice(p.sources.problems)
        text = question[:400].strip()
        answer = "The answer is " + answer.split("#### ")[-1].strip() + "."
    elif r < 0.5:
        text = p.choice(p.sources.sentences).strip()
        answer = p.choice(
            [
                "This is a line from an old tale.",
                "It reads like a line from an old book.",
                "That sounds like the beginning of a story.",
            ]
        )
    elif r < 0.75:
        text, answer = fact(p)
    else:
        text, sentences = plain_request(p)
        answer = " ".join(sentences)
    request = p.choice(
        [
            "Repeat this sentence exactly as it is, and then answer it: {q}",
            "Say the question again word for word and then answer it. {q}",
            "First say the request below again, word for word and without a change, and answer it "
            "after that. Nothing should stand before the repeated request.\n\n{q}",
            "{q}\n\nBefore you answer, repeat the request above word for word. Then answer.",
            "Repeat this request exactly as it is, and then answer it: {q}",
            "{q} First repeat this request word for word, then answer it.",
        ]
    ).format(q=text)
    return Instruction(request, f"{text}\n\n{answer}", [("repeat", text)])


def choose(p: Pieces) -> Instruction:
    """A yes-no question with three allowed answers."""
    r, animal = p.random.random(), p.choice(list(t.ANIMALS))
    if r < 0.2:
        question, answer = f"Will it be {p.choice(t.WEATHER)} tomorrow?", CHOICES[2]
    elif r < 0.5:
        thing = p.choice(
            [
                f"{article(animal)} read a newspaper",
                "a stone swim",
                f"{article(animal)} drive a car",
            ]
        )
        question, answer = f"Can {thing}?", CHOICES[1]
    else:
        yes = [
            f"Is {article(animal)} an animal?",
            f"Do you like {p.choice(t.FOODS)}?",
            f"Is {p.choice(list(t.OPPOSITES))} a word?",
            f"Is {p.topic().text} interesting?",
        ]
        question, answer = p.choice(yes), CHOICES[0]
    yes_said, no_said, maybe_said = CHOICES
    options = f"Choose from: '{no_said}', '{yes_said}', '{maybe_said}'"
    if p.chance(0.3):
        options = f"Answer with exactly one of: '{yes_said}' / '{maybe_said}' / '{no_said}'"
    return Instruction(f"{question} {options}", answer, [("choice", None), ("equals", answer)])


def instruction(p: Pieces) -> Instruction:
    """One request with constraints; the answer passes `check` for every one of them."""
    r = p.random.random()
    if r < 0.07:
        return repeat_first(p)
    if r < 0.11:
        return choose(p)
    draft = Draft(*plain_request(p))
    if r < 0.30:
        kind = p.choice(list(CASE_CHANGES))
        whole_text(p, draft, kind)
        if kind in ("lower", "upper") and p.chance(0.15):
            whole_text(p, draft, "nocomma")
    else:
        p.choice(FORMS)(p, draft)
        kind = draft.checks[0][0]
        if p.chance(0.35):
            if kind in WITH_ANY_CASE:
                whole_text(p, draft, p.choice(["lower", "upper", "nocomma"]))
            elif kind in WITH_NO_COMMA:
                whole_text(p, draft, "nocomma")
    return Instruction(_say(p, draft), draft.answer, draft.checks)
