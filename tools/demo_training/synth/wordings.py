"""A request in the words of different people: indirect, polite, in small letters, with a slip."""

from __future__ import annotations

import re

from .pieces import Pieces

# a question, and its form inside of another sentence
CLAUSES = (
    (re.compile(r"What(?: is|'s) (the .+)\?"), r"\1"),
    (re.compile(r"What(?: is|'s) (.+)\?"), r"what \1 is"),
    (re.compile(r"Who (was|is) (.+)\?"), r"who \2 \1"),
    (re.compile(r"Where (is|are) (.+)\?"), r"where \2 \1"),
    (re.compile(r"Why (?:do|does) (.+)\?"), r"why \1"),
    (re.compile(r"Why is ((?:the )?\w+) (.+)\?"), r"why \1 is \2"),
    (re.compile(r"How (?:do|can) I (.+)\?"), r"how to \1"),
    (re.compile(r"(What|Who|Which|How many|How much|Why|When|Where) ([^?]+)\?"), r"\1 \2"),
)
QUESTIONS = ("Can you tell me {c}?", "Could you tell me {c}?", "Do you know {c}?")
STATEMENTS = (
    "Tell me {c}.",
    "Please tell me {c}.",
    "I want to know {c}.",
    "I would like to know {c}.",
)
STATEMENTS += ("Let me know {c}.", "I wonder {c}.", "Say {c}.", "I forgot {c}.", "tell me {c}")


def indirect(p: Pieces, question: str) -> str:
    """Return the question inside of another sentence, or unchanged if it has no such form."""
    for pattern, form in CLAUSES:
        match = pattern.fullmatch(question)
        if match:
            clause = match.expand(form)
            clause = clause[0].lower() + clause[1:]
            if clause.startswith("the ") and p.chance(0.25):
                return p.choice(("{c}?", "{c}", "{c}, please", "Name {c}.")).format(c=clause)
            return p.choice(QUESTIONS if p.chance(0.5) else STATEMENTS).format(c=clause)
    return question


def slip(p: Pieces, request: str) -> str:
    """Return two neighbouring letters in the wrong order, or one left out."""
    at = p.between(0, len(request) - 2)
    pair = request[at : at + 2]
    if not pair.isalpha():
        return request
    return request[:at] + (pair[::-1] if p.chance(0.5) else pair[0]) + request[at + 2 :]


def casual(p: Pieces, request: str) -> str:
    """Return a short request as people type it."""
    if len(request) > 120 or "\n" in request:
        return request
    r = p.random.random()
    if 0.55 <= r < 0.72:
        return indirect(p, request)
    lowered = request[0].lower() + request[1:] if not request.startswith("I ") else request
    if r < 0.72:
        return request
    if r < 0.77:
        return p.choice(("Hi, ", "Hello, ", "Hey, ", "Hi! ", "Ok, ", "So, ")) + lowered
    if r < 0.81:
        return "Please " + lowered if not request.endswith("?") else "Please tell me: " + lowered
    if r < 0.83:
        return slip(p, request)
    if r < 0.92:
        return request.rstrip(".?!")
    return request.rstrip(".?!").lower()
