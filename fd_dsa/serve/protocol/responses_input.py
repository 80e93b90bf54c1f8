"""Converts items of a Responses request to messages of a chat completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fd_dsa.serve.errors import FieldError
from fd_dsa.serve.protocol.translation import READS_TEXT, Node, Translation, nodes, texts_of

_ITEMS = ("message", "reasoning", "function_call", "function_call_output")
_ROLES = ("system", "developer", "user", "assistant")


def add_items(made: Translation, items: Sequence[Node]) -> None:
    """Append the messages of a conversation.

    Consecutive items of the assistant become one message: reasoning, then content and calls.
    """
    turn: dict[str, Any] | None = None
    texts = list[str]()
    for item in items:
        kind = _kind(item)
        is_of_assistant = kind in ("reasoning", "function_call") or (
            kind == "message" and item.fields.get("role") == "assistant"
        )
        if not is_of_assistant:
            _ended(turn, texts)
            turn = None
            _add_other(made, item, kind)
            continue
        if turn is None or _begins_message(turn, any(texts), kind):
            _ended(turn, texts)
            turn = made.add_message("assistant", item.path, content="")
        if kind == "reasoning":
            turn["reasoning_content"] = _reasoning(item)
        elif kind == "message":
            texts += _texts(item, "content", ("output_text", "refusal"))
        else:
            made.add_call(
                item.path, item.text("call_id"), item.text("name"), item.fields.get("arguments")
            )
    _ended(turn, texts)


def _ended(turn: dict[str, object] | None, texts: list[str]) -> None:
    """Write the content of the assistant's message, if any, and clear `texts`."""
    if turn is not None:
        turn["content"] = "".join(texts)
    texts.clear()


def _kind(item: Node) -> str:
    if set(item.fields) <= {"id", "type"} and item.fields.get("type") in (None, "item_reference"):
        raise FieldError(
            f"{item.of('type')}: got a reference to an item; this server stores none; send the "
            "item itself"
        )
    return item.kind(_ITEMS, "this server runs no tools and stores no responses", "message")


def _begins_message(turn: dict[str, object], has_text: bool, kind: str) -> bool:
    """Return True if an item of the assistant begins another message.

    Args:
        has_text: True if the current message has a text.
    """
    has_calls = "tool_calls" in turn
    if kind == "reasoning":
        return has_text or has_calls or "reasoning_content" in turn
    return kind == "message" and has_text and not has_calls


def _add_other(made: Translation, item: Node, kind: str) -> None:
    if kind == "function_call_output":
        texts = _texts(item, "output", ("input_text", "output_text"))
        call_id = item.text("call_id")
        made.add_message("tool", item.path, content="\n".join(texts), tool_call_id=call_id)
        return
    role = item.one_of("role", _ROLES)
    texts = _texts(item, "content", ("input_text", "output_text"))
    made.add_message(role, item.path, content="\n".join(texts))


def _texts(item: Node, name: str, kinds: Sequence[str]) -> list[str]:
    """Return the texts of a field, which is a string or a list of parts of these types."""
    return texts_of(item.fields.get(name), item.of(name), (*kinds, "text"), "parts")


def _reasoning(item: Node) -> str:
    """Return the content of a reasoning item, otherwise its summary, "" if encrypted."""
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        parts = nodes(item.fields.get(name) or [], item.of(name))
        for part in parts:
            part.kind((kind,), READS_TEXT)
        if parts:
            return "\n".join(part.text("text") for part in parts)
    return ""
