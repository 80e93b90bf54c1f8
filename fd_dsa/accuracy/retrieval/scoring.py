"""Is an answer right: which of the hidden strings does it name?

`passed` = it names every string that was asked for and no other that the text hides. `share` = of
the asked strings those that it names: RULER's score (arXiv 2404.06654), which forgives others.
What a model thinks aloud, up to `</think>`, is not scored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from fd_dsa.accuracy.answers import Record
from fd_dsa.accuracy.retrieval.plan import Cell
from fd_dsa.accuracy.types import Answer, PromptScore

_END_OF_THOUGHT = "</think>"
# 1,234,567 is read as 1234567
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass(frozen=True)
class ItemScore:
    """One answer.

    Attributes:
        key: of the question.
        cell: it belongs to.
        wanted: the strings that were asked for.
        found: for each of them, whether the answer names it.
        wrong: hidden strings that it names although they were not asked for.
        answer: of the server.
    """

    key: str
    cell: Cell
    wanted: tuple[str, ...]
    found: tuple[bool, ...]
    wrong: tuple[str, ...]
    answer: Answer

    @property
    def passed(self) -> bool:
        """True if the answer names all that was asked for and nothing else that is hidden."""
        return all(self.found) and not self.wrong

    @property
    def share(self) -> float:
        """Of the asked strings those that the answer names, 0 to 1."""
        return sum(self.found) / len(self.found)

    def to_json(self) -> dict[str, Any]:
        """The score as a JSON object: that of a `PromptScore`, and what the task adds.

        An instruction is a string that was asked for; it is followed loosely if the answer names
        it, and strictly if the answer names nothing wrong besides.
        """
        answer = self.answer
        score = PromptScore(
            self.key,
            (self.cell.task,) * len(self.found),
            tuple(found and not self.wrong for found in self.found),
            self.found,
            answer.finish_reason,
            answer.prompt_tokens,
            answer.completion_tokens,
            sha256(answer.text.encode("utf-8", "surrogatepass")).hexdigest(),
        )
        told = {"wanted": self.wanted, "wrong": self.wrong, "answer": answer.text}
        return {**score.to_json(), **asdict(self.cell), **told}


def named(text: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """Those candidates that stand in the text as whole words; commas of thousands left aside."""
    plain = _THOUSANDS.sub("", text)
    return tuple(c for c in candidates if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", plain))


def score_record(record: Record) -> ItemScore:
    """The score of a kept answer."""
    metadata = record.metadata
    references = metadata["references"]
    text = record.answer.text.rpartition(_END_OF_THOUGHT)[2]
    right = named(text, references)
    return ItemScore(
        record.answer.key,
        Cell(metadata["task"], metadata["length"], metadata["depth"]),
        tuple(references),
        tuple(reference in right for reference in references),
        named(text, metadata["others"]),
        record.answer,
    )


@dataclass(frozen=True)
class Tally:
    """What the items of one cell, row or table sum up to.

    Attributes:
        passed: number of them.
        total: number of items.
        share: sum of their shares.
    """

    passed: int
    total: int
    share: float

    @property
    def mean_share(self) -> float:
        """Mean share of the asked strings, NaN without items."""
        return self.share / self.total if self.total else float("nan")


def tally(scores: Sequence[ItemScore]) -> Tally:
    """The sums over some items."""
    return Tally(sum(s.passed for s in scores), len(scores), sum(s.share for s in scores))


def by_cell(scores: Sequence[ItemScore]) -> Mapping[Cell, Tally]:
    """The sums of each cell."""
    groups: dict[Cell, list[ItemScore]] = {}
    for score in scores:
        groups.setdefault(score.cell, []).append(score)
    return {cell: tally(group) for cell, group in groups.items()}
