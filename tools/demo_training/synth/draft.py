"""A request in the making, and the essays that rules of form are put on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .pieces import Pieces
from .prose import ESSAY_REQUESTS, essay

Checks = list[tuple[str, Any]]


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
    draft.request = p.choice(ESSAY_REQUESTS).format(t=topic.text)
    draft.sentences = essay(p, topic, count)
    return draft.sentences


def essay_parts(p: Pieces, draft: Draft, count: int, per_part: int = 2) -> list[str]:
    """The text of `count` parts of one essay, without a repeated sentence."""
    lines = retopic(p, draft, count * per_part)
    groups = [lines[i * per_part : (i + 1) * per_part] for i in range(count)]
    return [" ".join(g) for g in groups]
