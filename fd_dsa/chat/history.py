"""Messages of a conversation's history."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Arguments(dict[str, Any]):
    """A JSON object that templates may use as a mapping and as its text.

    Some templates go through the items, others put the arguments between two texts; those get
    the JSON as it was given, so that it stays what the model wrote.
    """

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        """Keep the object and its JSON text."""
        super().__init__(value)
        self.text = text

    @classmethod
    def read(cls, value: str | Mapping[str, Any]) -> Arguments:
        """Arguments from JSON text or from a mapping; an empty text has none.

        Raises:
            ValueError: the text is no JSON object.
        """
        if not isinstance(value, str):
            return cls(value, json.dumps(value, ensure_ascii=False))
        try:
            parsed = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of a tool call are no JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise ValueError("the arguments of a tool call are no JSON object")
        return cls(parsed, value if value.strip() else "{}")

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: str) -> str:
        return self.text + other

    def __radd__(self, other: str) -> str:
        return other + self.text


def is_reasoning_only(message: Mapping[str, Any]) -> bool:
    """Whether a message of the assistant ends inside of its reasoning."""
    return bool(message.get("reasoning_content")) and not (
        message.get("content") or message.get("tool_calls")
    )
