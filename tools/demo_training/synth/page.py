"""An answer in the making: blocks of sentences, texts above and below, changes of letters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .pieces import Topic
from .short_rules import Checks, json_text


@dataclass
class Page:
    """The parts of an answer and the rules it keeps.

    Attributes:
        topic: what it is about.
        blocks: sentences of each paragraph, bullet, section or answer.
        form: what the blocks are: "plain", "bullets", "paragraphs", "firstword", "sections",
            "two" or "json".
        mark: the word before the number of a section.
        title, last: a line above, a text below ("" = none).
        letters: changes of the whole text, in their order.
        checks: (kind, argument) of every rule.
        said: (kind of wording, its fields) of every rule.
    """

    topic: Topic
    blocks: list[list[str]]
    form: str = "plain"
    mark: str = ""
    title: str = ""
    last: str = ""
    letters: list[Callable[[str], str]] = field(default_factory=list)
    checks: Checks = field(default_factory=list)
    said: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def keep(self, kind: str, arg=None, **fields: object) -> None:
        """Note a rule: its check and the fields of its wording."""
        self.checks.append((kind, arg))
        self.said.append((kind, {k: str(v) for k, v in fields.items()}))

    def text(self) -> str:
        """Return the whole answer."""
        parts = [" ".join(block) for block in self.blocks]
        if self.form == "json":
            body = json_text(("topic", "text", "note", "summary"), [self.topic.text, *parts])
        elif self.form == "bullets":
            body = "\n".join("* " + x for x in parts)
        elif self.form == "sections":
            body = "\n\n".join(f"{self.mark} {i + 1}\n{x}" for i, x in enumerate(parts))
        else:
            joint = {"paragraphs": "\n\n***\n\n", "two": "\n\n******\n\n"}.get(self.form, "\n\n")
            body = joint.join(parts)
        if self.title:
            body = f"<<{self.title}>>\n\n{body}"
        body += self.last
        for change in self.letters:
            body = change(body)
        return body


def cut(sentences: list[str], blocks: int) -> list[list[str]]:
    """Return sentences in order as `blocks` groups of nearly one size."""
    size, rest = divmod(len(sentences), blocks)
    found, start = [], 0
    for i in range(blocks):
        end = start + size + (i < rest)
        found.append(sentences[start:end])
        start = end
    return found
