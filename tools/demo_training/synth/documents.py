"""The mixture of documents; `Generator` is what training, tokenizer and evaluation use.

A document is a list of (role, text); roles: "raw", "system", "user", "assistant". The same seed
and sources give the same documents.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .assignments import assigned
from .instructions import Instruction, instruction
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
        self._kinds = (
            (3.5, self._passage),
            (3.0, lambda: copying(self.pieces)),
            (2.0, self._problem_text),
            (3.0, self._given_instruction),
            (9.0, lambda: self._exchange(plain_request)),
            (14.0, lambda: self._instruction(self.instruction())),
            (28.0, lambda: self._instruction(self.assignment())),
            (5.0, lambda: self._exchange(arithmetic)),
            (8.0, lambda: self._exchange(fact)),
            (1.5, lambda: self._exchange(word_list, plainly=True)),
            (3.0, lambda: self._exchange(persona)),
            (1.5, lambda: self._exchange(problem)),
            (2.5, lambda: self._exchange(unknown)),
            (5.0, lambda: self._exchange(reading, plainly=True)),
            (3.0, lambda: several_questions(self.pieces)),
            (5.0, self._chat),
            (2.5, lambda: key_values(self.pieces, self.pieces.between(2, 30))),
            (5.0, lambda: self.retrieval(self._short_length())[0]),
            (4.0, lambda: long_task(self.pieces, self._short_length())),
            (2.0, lambda: variables(self.pieces, 0)),
        )
        self._total = sum(share for share, _ in self._kinds)

    def document(self) -> Document:
        """One document of at most a few thousand characters."""
        point = self.pieces.random.random() * self._total
        for share, make in self._kinds:
            point -= share
            if point < 0:
                return make()
        return self._kinds[-1][1]()

    def _short_length(self) -> int:
        """60 to 2,400 characters, small ones more often."""
        return int(60 * 40 ** self.pieces.random.random())

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
        return self.retrieval(size)[0]

    def instruction(self) -> Instruction:
        """One request with verifiable constraints."""
        return instruction(self.pieces)

    def assignment(self) -> Instruction:
        """One long-winded request, mostly with verifiable constraints."""
        return assigned(self.pieces)

    def retrieval(
        self, characters: int, needles: int | None = None, everyday: float = 0.25
    ) -> tuple[Document, str]:
        """A document with hidden facts, and the value that answers it (see retrieval.retrieval)."""
        return retrieval(self.pieces, characters, needles, everyday)

    def _passage(self) -> Document:
        """A piece of the texts."""
        p = self.pieces
        text = p.sources.play if p.chance(0.35) else p.sources.tales
        start = p.between(0, max(0, len(text) - 3000))
        return [("raw", text[start : start + p.between(600, 2800)])]

    def _problem_text(self) -> Document:
        question, answer = self.pieces.choice(self.pieces.sources.problems)
        answer = re.sub(r"<<.*?>>", "", answer).replace("#### ", "The answer is ")
        return [("user", question), ("assistant", answer)]

    def _given_instruction(self) -> Document:
        request, answer = self.pieces.choice(self.pieces.sources.instructions)
        return [("user", request), ("assistant", answer)]

    def _instruction(self, found: Instruction) -> Document:
        return [("user", found.request), ("assistant", found.answer)]

    def _exchange(self, make, plainly: bool = False) -> Document:
        """One request and its answer; `make` gives (request, text or sentences)."""
        request, answer = make(self.pieces)
        text = answer if isinstance(answer, str) else " ".join(answer)
        asked = request if plainly else casual(self.pieces, request)
        return [("user", asked), ("assistant", text)]

    def _chat(self) -> Document:
        """Two to four exchanges; a third asks for something said in the first."""
        p = self.pieces
        turns: Document = []
        for _ in range(p.between(1, 3)):
            kind = p.choice(
                [arithmetic, fact, fact, fact, persona, problem, plain_request, reading]
            )
            turns += self._exchange(kind, plainly=kind is reading)
        if p.chance(0.4):
            turns = names_chat(p, turns)
        else:
            turns += self._exchange(fact)
        if p.chance(0.2):
            turns = [("system", p.choice(talk.systems)), *turns]
        return turns
