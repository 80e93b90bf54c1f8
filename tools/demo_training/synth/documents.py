"""The mixture of documents; `Generator` is what training, tokenizer and evaluation use.

A document is a list of (role, text); roles: "raw", "system", "user", "assistant". The same seed
and sources give the same documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .assignments import assigned
from .instructions import instruction
from .long_tasks import long_task, variables
from .pieces import Document, Pieces
from .prose import plain_request
from .questions import arithmetic, fact, word_list
from .reading import copying, reading, several_questions
from .retrieval import key_values, retrieval
from .talk import names_chat, persona, problem, talk, unknown

if TYPE_CHECKING:
    from ..sources import Sources


def casual(p: Pieces, request: str) -> str:
    """A short request as people type it: at times polite, in small letters, without an end mark."""
    r = p.random.random()
    if r < 0.72 or len(request) > 120 or "\n" in request:
        return request
    lowered = request[0].lower() + request[1:] if not request.startswith("I ") else request
    if r < 0.77:
        return p.choice(["Hi, ", "Hello, ", "Hey, "]) + lowered
    if r < 0.81:
        return "Please " + lowered if not request.endswith("?") else "Please tell me: " + lowered
    if r < 0.85 and request.endswith("?"):
        return "Can you tell me " + lowered if request.startswith("What") else request
    if r < 0.93:
        return request.rstrip(".?!")
    return request.rstrip(".?!").lower()


class Generator:
    """Draws documents. `document()` for short rows, `long_document()` for long ones."""

    def __init__(self, seed: int, sources: Sources):
        self.pieces = Pieces(seed, sources)
        self._total = sum(share for share, _ in KINDS)

    def document(self) -> Document:
        """One document of at most a few thousand characters."""
        point = self.pieces.random.random() * self._total
        for share, make in KINDS:
            point -= share
            if point < 0:
                return make(self.pieces)
        return KINDS[-1][1](self.pieces)

    def long_document(self, characters: int = 12500) -> Document:
        """A retrieval document, another task on a long text, or a list of 40 pairs and more.

        Args:
            characters: the largest length; 800 is the smallest.
        """
        p = self.pieces
        r, size = p.random.random(), p.between(800, characters)
        if r < 0.1:
            return key_values(p, p.between(40, characters // 36))
        if r < 0.5:
            return long_task(p, size)
        return retrieval(p, size)


def short_length(p: Pieces) -> int:
    """60 to 2,400 characters, small ones more often."""
    return int(60 * 40 ** p.random.random())


def passage(p: Pieces) -> Document:
    """A piece of the texts."""
    text = p.sources.play if p.chance(0.35) else p.sources.tales
    start = p.between(0, max(0, len(text) - 3000))
    return [("raw", text[start : start + p.between(600, 2800)])]


def problem_text(p: Pieces) -> tuple[str, str]:
    """A problem of the texts, and the steps to its answer."""
    question, answer = p.choice(p.sources.problems)
    return question, re.sub(r"<<.*?>>", "", answer).replace("#### ", "The answer is ")


def exchange(p: Pieces, make: Callable[[Pieces], Any], plainly: bool = False) -> Document:
    """One request and its answer; `make` gives (request, text or sentences), and more or not."""
    request, answer, *_ = make(p)
    text = answer if isinstance(answer, str) else " ".join(answer)
    return [("user", request if plainly else casual(p, request)), ("assistant", text)]


def chat(p: Pieces) -> Document:
    """Two to four exchanges; a third asks for something said in the first."""
    turns: Document = []
    for _ in range(p.between(1, 3)):
        kind = p.choice([arithmetic, fact, fact, fact, persona, problem, plain_request, reading])
        turns += exchange(p, kind, plainly=kind is reading)
    if p.chance(0.4):
        turns = names_chat(p, turns)
    else:
        turns += exchange(p, fact)
    if p.chance(0.2):
        turns = [("system", p.choice(talk.systems)), *turns]
    return turns


# share of each kind
KINDS: tuple[tuple[float, Callable[[Pieces], Document]], ...] = (
    (3.5, passage),
    (3.0, copying),
    (2.0, lambda p: exchange(p, problem_text, plainly=True)),
    (3.0, lambda p: exchange(p, lambda p: p.choice(p.sources.instructions), plainly=True)),
    (9.0, lambda p: exchange(p, plain_request)),
    (14.0, lambda p: exchange(p, instruction, plainly=True)),
    (28.0, lambda p: exchange(p, assigned, plainly=True)),
    (5.0, lambda p: exchange(p, arithmetic)),
    (8.0, lambda p: exchange(p, fact)),
    (1.5, lambda p: exchange(p, word_list, plainly=True)),
    (3.0, lambda p: exchange(p, persona)),
    (1.5, lambda p: exchange(p, problem)),
    (2.5, lambda p: exchange(p, unknown)),
    (5.0, lambda p: exchange(p, reading, plainly=True)),
    (3.0, several_questions),
    (5.0, chat),
    (2.5, lambda p: key_values(p, p.between(2, 30))),
    (5.0, lambda p: retrieval(p, short_length(p))),
    (4.0, lambda p: long_task(p, short_length(p))),
    (2.0, lambda p: variables(p, 0)),
)
