"""Reasoning at the beginning of an output, and the beginning of the answer after it.

Stop strings, `min_tokens`, bad words and structured output apply to the answer. They ignore the
reasoning, as the hosted services of reasoning models do.

Only the end marker ends the reasoning. A call inside the reasoning does not, because models also
quote calls.
"""

from __future__ import annotations

import copy
import reprlib
from dataclasses import dataclass
from typing import Literal

from fd_dsa.chat.parser import THINK_BEGIN, THINK_END, AnswerFormat
from fd_dsa.chat.text_feed import MAX_SPACE
from fd_dsa.engine.detokenizer import Detokenizer

_MAX_MARKER_CHARS = 128


@dataclass(frozen=True)
class Reasoning:
    """Texts around the reasoning of an output.

    Args:
        begin: text that opens the reasoning at the beginning of the output, with white space
            allowed before it; "" = the prompt has opened the reasoning.
        end: text whose first occurrence ends the reasoning.

    Raises:
        ValueError: `end` is empty, or a text is too long.
    """

    begin: str = ""
    end: str = THINK_END

    def __post_init__(self) -> None:
        for name, minimum in (("begin", 0), ("end", 1)):
            text = getattr(self, name)
            if not isinstance(text, str) or not minimum <= len(text) <= _MAX_MARKER_CHARS:
                raise ValueError(
                    f"reasoning.{name}: got {reprlib.repr(text)}; must be a text of {minimum} to "
                    f"{_MAX_MARKER_CHARS} characters"
                )

    @classmethod
    def of(cls, answer: AnswerFormat) -> Reasoning | None:
        """Return the markers of a chat format, or None if its answers have no reasoning."""
        if not answer.has_reasoning:
            return None
        return cls("" if answer.in_reasoning else THINK_BEGIN)


class AnswerStart:
    """Finds the beginning of the answer in an output that may begin with reasoning.

    The text may come in any pieces. White space between the end of the reasoning and the answer
    belongs to the reasoning, because models write it with the end marker.

    Args:
        reasoning: texts around the reasoning.
        detokenizer: detokenizer of the output, whose copies decode drafts.

    Attributes:
        index: index of the answer's first token in the output; None inside the reasoning. A token
            with the end of the marker belongs to the reasoning, also if it has text of the answer.
    """

    def __init__(self, reasoning: Reasoning, detokenizer: Detokenizer) -> None:
        self._reasoning, self._detokenizer = reasoning, detokenizer
        self._state: Literal["start", "reasoning", "space", "answer"] = "start"
        # in the state "start" the whole text, in "reasoning" the end of the shown text
        self._tail = ""
        self.index: int | None = 0
        if not reasoning.begin:
            self._state, self.index = "reasoning", None

    @property
    def is_found(self) -> bool:
        """True if further tokens do not change `index`."""
        return self._state in ("space", "answer")

    def copy(self) -> AnswerStart:
        """Return a copy, which reads drafts of the output."""
        other = copy.copy(self)
        other._detokenizer = self._detokenizer.copy()
        return other

    def append_draft(self, token_id: int, num_tokens: int) -> None:
        """Decode a draft and append its text. Only copies have drafts.

        Args:
            token_id: the draft.
            num_tokens: length of the output with this token.
        """
        self.append(self._detokenizer.append(token_id), num_tokens)

    def append(self, text: str, num_tokens: int) -> tuple[str, str]:
        """Append more text of the output.

        Args:
            text: the text.
            num_tokens: length of the output with the tokens of the text.

        Returns:
            Text of the reasoning and text of the answer. Both are empty while the text may still
            open the reasoning.
        """
        if self._state == "start":
            text = self._tail + text
            rest = self._opened(text)
            if rest is None:
                return "", ("" if self._state == "start" else text)
            before, text = text[: len(text) - len(rest)], rest
        else:
            before = ""
        if self._state == "reasoning":
            end = self._find_end(text)
            if end is None:
                return before + text, ""
            self._state, self.index = "space", num_tokens
            before, text = before + text[:end], text[end:]
        if self._state == "space":
            answer = text.lstrip()
            before += text[: len(text) - len(answer)]
            text = answer
            if answer:
                self._state = "answer"
        return before, text

    def flush(self) -> str:
        """Return the held text, which belongs to the answer. Call it once, at the end."""
        held = self._tail if self._state == "start" else ""
        self._tail, self._state = "", "answer"
        return held

    def _opened(self, text: str) -> str | None:
        """Return the text after the marker that opens the reasoning.

        Returns:
            None if the output does not begin with the marker, or is too short to tell.
        """
        begin, stripped = self._reasoning.begin, text.lstrip()
        if len(text) - len(stripped) <= MAX_SPACE:
            if stripped.startswith(begin):
                self._state, self._tail, self.index = "reasoning", "", None
                return stripped[len(begin) :]
            if begin.startswith(stripped):
                self._tail = text
                return None
        self._state = "answer"
        return None

    def _find_end(self, text: str) -> int | None:
        """Return the offset in `text` after the end of the reasoning, or None without an end."""
        end, num_shown = self._reasoning.end, len(self._tail)
        text = self._tail + text
        start = text.find(end)
        if start >= 0:
            return start + len(end) - num_shown
        self._tail = text[max(0, len(text) - len(end) + 1) :]
        return None


def is_too_short(num_tokens: int, min_tokens: int, answer: AnswerStart | None) -> bool:
    """Return True if an output of `num_tokens` must not end yet.

    Args:
        min_tokens: number of tokens that the answer must have.
        answer: beginning of the answer; None = the whole output is the answer.
    """
    begin = 0 if answer is None else answer.index
    return min_tokens > 0 and (begin is None or num_tokens - begin < min_tokens)
