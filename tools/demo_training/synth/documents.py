"""The mixture of documents. Training, tokenizer and evaluation use `Generator`.

A document is a list of (role, text); roles: "raw", "system", "user", "assistant". The same seed
and sources give the same documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..heldout import is_held_out
from .about import country, introduction
from .assignments import assigned
from .calls import call
from .chinese import chinese_chat
from .instructions import instruction
from .long_tasks import long_task, variables
from .pieces import Document, Pieces
from .prose import plain_request
from .questions import arithmetic, fact, word_list
from .reading import copying, reading, several_questions
from .refusals import hard_problem, refusal
from .retrieval import key_values, retrieval
from .talk import names_chat, persona, problem, talk, unknown
from .wordings import casual

if TYPE_CHECKING:
    from ..sources import Sources


class Generator:
    """Draws documents. `document()` for short rows, `long_document()` for long ones."""

    def __init__(self, seed: int, sources: Sources):
        self.pieces = Pieces(seed, sources)
        self._total = sum(share for share, _ in KINDS)

    def document(self) -> Document:
        """Return a document of at most a few thousand characters, without a held-out prompt."""
        while True:
            found = self._document()
            if not any(role == "user" and is_held_out(text) for role, text in found):
                return found

    def _document(self) -> Document:
        point = self.pieces.random.random() * self._total
        for share, make in KINDS:
            point -= share
            if point < 0:
                return make(self.pieces)
        return KINDS[-1][1](self.pieces)

    def long_document(self, characters: int = 12500) -> Document:
        """Return a retrieval document, another task on a long text, or a list of 40 pairs and more.

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
    """Return 60 to 2,400 characters, small ones more often."""
    return int(60 * 40 ** p.random.random())


def passage(p: Pieces) -> Document:
    """Return a piece of the texts."""
    text = p.sources.play if p.chance(0.35) else p.sources.tales
    start = p.between(0, max(0, len(text) - 3000))
    return [("raw", text[start : start + p.between(600, 2800)])]


# what the model refuses, or has tables of its own for
NOT_TAUGHT = re.compile(
    r"translat|summary|summari[sz]|cod|python|sql|java|function|program|html|convert|calculate|"
    r"calculating|calculation|calculator|classif|\d",
    re.I,
)


def taught(p: Pieces) -> tuple[str, str]:
    """Return a request of the instructions that the model does not refuse."""
    while True:
        request, answer = p.choice(p.sources.instructions)
        if not NOT_TAUGHT.search(request):
            return request, answer


def exchange(p: Pieces, make: Callable[[Pieces], Any], plainly: bool = False) -> Document:
    """Return a request and its answer, made by `make`."""
    request, answer, *_ = make(p)
    text = answer if isinstance(answer, str) else " ".join(answer)
    return [("user", request if plainly else casual(p, request)), ("assistant", text)]


def instructed(p: Pieces, make: Callable[[Pieces], Any]) -> Document:
    """Return an exchange of its own, a tenth of them under a system prompt."""
    found = exchange(p, make)
    return [("system", p.choice(talk.systems)), *found] if p.chance(0.1) else found


CHATTED = (arithmetic, fact, fact, persona, problem, plain_request, reading)
CHATTED += (introduction, introduction, country, refusal, refusal)


def chat(p: Pieces) -> Document:
    """Return two to four exchanges. A third of them asks for something said in the first."""
    turns: Document = []
    for _ in range(p.between(1, 3)):
        kind = p.choice(CHATTED)
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
    (2.0, passage),
    (5.0, copying),
    (1.0, lambda p: exchange(p, hard_problem, plainly=True)),
    (1.5, lambda p: exchange(p, taught, plainly=True)),
    (10.0, lambda p: exchange(p, plain_request)),
    (18.0, lambda p: exchange(p, instruction, plainly=True)),
    (44.0, lambda p: exchange(p, assigned, plainly=True)),
    (8.5, lambda p: instructed(p, arithmetic)),
    (7.0, lambda p: instructed(p, fact)),
    (7.0, lambda p: instructed(p, country)),
    (1.5, lambda p: exchange(p, word_list, plainly=True)),
    (1.5, lambda p: instructed(p, persona)),
    (7.0, lambda p: instructed(p, introduction)),
    (1.5, lambda p: exchange(p, problem)),
    (2.5, lambda p: exchange(p, unknown)),
    (13.0, lambda p: instructed(p, refusal)),
    (5.0, lambda p: exchange(p, reading, plainly=True)),
    (3.0, several_questions),
    (6.0, chat),
    (12.0, chinese_chat),
    (7.0, call),
    (2.5, lambda p: key_values(p, p.between(2, 30))),
    (5.0, lambda p: retrieval(p, short_length(p))),
    (6.0, lambda p: long_task(p, short_length(p))),
    (14.0, lambda p: variables(p, 0)),
)
