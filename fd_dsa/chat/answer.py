"""How the answers to one prompt are read: what the model writes, and what the prompt has begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fd_dsa.chat.parser import THINK_BEGIN, THINK_END, OutputParser, ToolFormat


@dataclass(frozen=True)
class AnswerFormat:
    """The form of answers.

    Attributes:
        has_reasoning: whether <think>...</think> is split off.
        in_reasoning: the prompt has opened the reasoning.
        tool_format: how calls are written; None where none are looked for.
        schemas: name of each tool -> JSON schema of its arguments.
    """

    has_reasoning: bool = False
    in_reasoning: bool = False
    tool_format: ToolFormat | None = None
    schemas: Mapping[str, Any] = field(default_factory=dict)

    @property
    def begins_in_reasoning(self) -> bool:
        """Whether an answer begins with reasoning that is split off."""
        return self.has_reasoning and self.in_reasoning

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser must see."""
        thinking = (THINK_BEGIN, THINK_END) if self.has_reasoning else ()
        return (*thinking, *(self.tool_format.markers if self.tool_format else ()))

    def new_parser(self) -> OutputParser:
        """A parser for one answer."""
        return OutputParser(self.has_reasoning, self.tool_format, self.schemas, self.in_reasoning)
