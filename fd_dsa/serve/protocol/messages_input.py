"""Converts messages of a Messages request to messages of a chat completion."""

from __future__ import annotations

from collections.abc import Sequence

from fd_dsa.serve.errors import FieldError
from fd_dsa.serve.protocol.translation import READS_TEXT, Node, Translation, nodes, texts_of

_ROLES = ("user", "assistant", "system")
_OF_USER = ("text", "tool_result")
_OF_ASSISTANT = ("text", "thinking", "redacted_thinking", "tool_use")


def joined_texts(value: object, path: str) -> str:
    """Return the text of a content, which is a string or a list of text blocks."""
    return "\n".join(texts_of(value, path, ("text",), "blocks"))


def add_messages(made: Translation, messages: Sequence[Node]) -> None:
    """Append the messages of a conversation. A tool's result becomes its own message."""
    for message in messages:
        role = message.one_of("role", _ROLES)
        content, path = message.fields.get("content"), message.of("content")
        if role == "system" or isinstance(content, str):
            made.add_message(role, message.path, content=joined_texts(content, path))
        elif role == "assistant":
            _add_assistant(made, message, nodes(content, path))
        else:
            _add_user(made, message, nodes(content, path))


def _add_assistant(made: Translation, message: Node, blocks: Sequence[Node]) -> None:
    turn = made.add_message("assistant", message.path, content="")
    texts, thoughts = list[str](), list[str]()
    for block in blocks:
        kind = block.kind(_OF_ASSISTANT, READS_TEXT)
        if kind == "text":
            texts.append(block.text("text"))
        elif kind == "thinking":
            thoughts.append(block.text("thinking"))
        elif kind == "tool_use":
            arguments = Node(block.fields.get("input"), block.of("input")).fields
            made.add_call(block.path, block.text("id"), block.text("name"), arguments)
    turn["content"] = "".join(texts)
    if thoughts:
        turn["reasoning_content"] = "".join(thoughts)


def _add_user(made: Translation, message: Node, blocks: Sequence[Node]) -> None:
    if not blocks:
        raise FieldError(f"{message.of('content')}: has no blocks; send at least one")
    texts: list[str] = []
    for block in blocks:
        if block.kind(_OF_USER, READS_TEXT) == "text":
            texts.append(block.text("text"))
            continue
        if texts:
            made.add_message("user", message.path, content="\n".join(texts))
            texts = []
        result = joined_texts(block.fields.get("content") or "", block.of("content"))
        if block.flag("is_error"):
            result = f"Error: {result}"
        call_id = block.text("tool_use_id")
        made.add_message("tool", block.path, content=result, tool_call_id=call_id)
    if texts:
        made.add_message("user", message.path, content="\n".join(texts))
