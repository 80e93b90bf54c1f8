"""Messages of a chat completion."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from fd_dsa.serve.errors import FieldError, show
from fd_dsa.serve.protocol.fields import MAX_ENTRIES, TEXT, Body, at_most, refuse

MAX_ARGUMENTS_CHARS = 1 << 20
"""Of the arguments of one call in the history, as text."""

_ROLES = ("system", "developer", "user", "assistant", "tool")


def _role(value: Any) -> str:
    """Role of a chat message; `developer` is the newer name of `system`."""
    if value not in _ROLES:
        raise refuse(f"got {show(value)}; allowed are {', '.join(_ROLES)}")
    return "system" if value == "developer" else str(value)


def _content(value: Any) -> str | None:
    """Text of a chat message; text parts are joined by line breaks."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise refuse(f"got {show(value)}; allowed is a string or a list of text parts")
    if len(value) > MAX_ENTRIES:
        raise refuse(f"has {len(value)} parts; at most {MAX_ENTRIES} are allowed")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise refuse(f"part {index} has type {show(kind)}; this server reads text only")
        if not isinstance(part.get("text"), str):
            raise refuse(f"part {index} has no text; give it as a string")
        texts.append(part["text"])
    return "\n".join(texts)


def _arguments(value: Any) -> str:
    """Arguments of a call, as the JSON text that they were answered as; empty: none.

    An object is taken too, as other servers do.
    """
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and len(value) > MAX_ARGUMENTS_CHARS:
        raise refuse(
            f"has {len(value)} characters; at most {MAX_ARGUMENTS_CHARS} are allowed in one call"
        )
    try:
        parsed = json.loads(value) if isinstance(value, str) and value.strip() else {}
    except (ValueError, RecursionError) as error:
        raise refuse(f"got {show(value)}; allowed is the JSON text of an object: {error}") from None
    if not isinstance(value, str) or not isinstance(parsed, dict):
        raise refuse(f"got {show(value)}; allowed is the JSON text of an object")
    return value


_RoleField = Annotated[
    str, PlainValidator(_role), WithJsonSchema({"type": "string", "enum": list(_ROLES)})
]
_ContentField = Annotated[
    str | None,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [TEXT, {"type": "array", "items": {"type": "object"}}]}),
]
_ArgumentsField = Annotated[str, PlainValidator(_arguments), WithJsonSchema(TEXT)]


class CalledFunction(Body):
    """The function of a call in the history."""

    name: str = Field(min_length=1)
    arguments: _ArgumentsField


class CallInHistory(Body):
    """A call that the assistant made in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One message; further fields, such as `name`, reach the chat template."""

    role: _RoleField
    content: _ContentField = Field(None, description="Needed, but in messages that call tools.")
    reasoning_content: str | None = Field(None, description="Reasoning of an earlier answer.")
    reasoning: str | None = Field(None, description="Another name of reasoning_content.")
    tool_calls: Annotated[list[CallInHistory], at_most(MAX_ENTRIES)] | None = None
    tool_call_id: str | None = Field(None, description="The call that a tool's result is of.")

    def check(self, path: str) -> None:
        """Raise ApiError 400 where fields do not go together; `path` is the message's own."""
        if self.role != "assistant":
            for name in ("tool_calls", "reasoning_content", "reasoning"):
                if getattr(self, name):
                    raise FieldError(
                        f"{path}.{name}: given in a message of role {self.role}; only one of role "
                        "assistant has it"
                    )
        if self.content is None and not (
            self.tool_calls or self.reasoning_content or self.reasoning
        ):
            what = "got null" if "content" in self.model_fields_set else "is missing"
            raise FieldError(
                f"{path}.content: {what}; allowed is a string or a list of text parts, and "
                "nothing only where the assistant calls tools"
            )

    def for_template(self) -> dict[str, Any]:
        """The message as the chat template sees it: content a text, reasoning under one name."""
        fields = self.model_dump(exclude_none=True, exclude={"reasoning"})
        reasoning = self.reasoning_content or self.reasoning
        return {
            **fields,
            "content": self.content or "",
            **({"reasoning_content": reasoning} if reasoning else {}),
        }
