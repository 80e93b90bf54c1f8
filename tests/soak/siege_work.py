"""Requests that cause far more work than their size, and work whose clients leave."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.chat.template_attacks import ATTACKS
from tests.soak.hostile import HostileRequest
from tests.soak.siege_requests import (
    CHAT,
    COMPLETIONS,
    MEGABYTE,
    MESSAGES,
    RESPONSES,
    USER,
    Case,
    Facts,
    one,
    post,
)

# bytes of a schema, below the --max-prompt-bytes of the demo model
SCHEMA_BYTES = 120_000
GLM_CALLS = ("--tool-call-parser", "glm47")
V31_CALLS = ("--tool-call-parser", "deepseek_v31")
TEMPLATES = ("--trust-request-chat-template",)
AMBIGUOUS = "start: s\ns: s s | s s s | /[a-z ]/ |"


def _calls(schema: Any, choice: str = "required") -> dict[str, Any]:
    """A chat with one tool of this schema."""
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return {"messages": USER, "tools": [tool], "tool_choice": choice, "max_tokens": 4}


def ladder(width: int, levels: int) -> dict[str, Any]:
    """A schema with `width` ** `levels` ways to the same type."""
    steps = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * width} for i in range(levels)} | {
        f"d{levels}": {"type": "string"}
    }
    return {
        "type": "object",
        "$defs": steps,
        "properties": {"a": {"$ref": "#/$defs/d0"}},
        "required": ["a"],
    }


def shared_definitions(num_properties: int, num_fields: int) -> dict[str, Any]:
    """Many arguments that refer to one large definition."""
    fields = {f"field{i}": {"type": "string"} for i in range(num_fields)}
    properties = {f"p{i}": {"$ref": "#/$defs/d"} for i in range(num_properties)}
    definition = {"type": "object", "properties": fields}
    return {"type": "object", "$defs": {"d": definition}, "properties": properties}


def nested_patterns(size: int) -> dict[str, Any]:
    """Arguments with patterns whose anchors are inside of 320 groups."""
    patterns = ("(" * 320 + f"^{i}" + ")" * 320 for i in range(size // 720))
    properties = {f"a{i}": {"type": "string", "pattern": each} for i, each in enumerate(patterns)}
    return {"type": "object", "properties": properties}


def nested_key_patterns() -> dict[str, Any]:
    """Patterns of names, each of which excludes all others."""
    names = ("(" * 300 + f"^{i}" + ")" * 300 for i in range(60))
    return {"type": "object", "patternProperties": {name: {} for name in names}}


def repeated_values(keyword: str, size: int) -> dict[str, Any]:
    """One argument whose schema refers to the same long list of values again and again."""
    values = [str(i) for i in range(3000)]
    parts = [{"$ref": "#/$defs/e"}] * ((size - 40_000) // 24)
    return {
        "type": "object",
        "$defs": {"e": {"enum": values}},
        "properties": {"a": {keyword: parts}},
    }


def repeated_names(size: int) -> dict[str, Any]:
    """Alternatives that require the same many names, in each of many arguments."""
    each = [{"type": "object", "$ref": "#/$defs/e", "required": [str(i)]} for i in range(30)]
    properties = {f"a{i}": {"oneOf": each} for i in range((size - 40_000) // 1800)}
    names = [f"r{i}" for i in range(3000)]
    return {"type": "object", "$defs": {"e": {"required": names}}, "properties": properties}


SCHEMAS: dict[str, Any] = {
    "a ladder of alternatives": ladder(150, 4),
    "large definitions that are shared": shared_definitions(400, 1000),
    "patterns with nested anchors": nested_patterns(SCHEMA_BYTES),
    "patterns of names with nested anchors": nested_key_patterns(),
    "allOf of the same values": repeated_values("allOf", SCHEMA_BYTES),
    "anyOf of the same values": repeated_values("anyOf", SCHEMA_BYTES),
    "oneOf with the same required names": repeated_names(SCHEMA_BYTES),
}
"""Schemas of at most `SCHEMA_BYTES` that once took seconds, gigabytes, or both."""


def _schemas(_: Facts) -> Iterator[HostileRequest]:
    """Each schema, forced, free, and as the form of an answer."""
    for schema in SCHEMAS.values():
        yield post(CHAT, _calls(schema))
        yield post(CHAT, _calls(schema, "auto"))
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        yield post(CHAT, {"messages": USER, "response_format": form, "max_tokens": 4})


def _grammars(_: Facts) -> Iterator[HostileRequest]:
    """200 grammars that differ."""
    for number in range(200):
        fields = {f"f{number}x{i}": {"type": "string", "pattern": "[a-z]+"} for i in range(40)}
        schema = {"type": "object", "properties": fields, "required": list(fields)}
        yield post(COMPLETIONS, {"prompt": "a", "max_tokens": 4, "guided_json": schema})


def _ambiguous(n: int, copies: int = 1) -> Any:
    body = {"prompt": "a", "n": n, "max_tokens": 64, "ignore_eos": True}
    return one(COMPLETIONS, lambda _: {**body, "guided_grammar": AMBIGUOUS}, copies)


def _templates(_: Facts) -> Iterator[HostileRequest]:
    for source in ATTACKS.values():
        yield post(CHAT, {"messages": USER, "chat_template": source, "max_tokens": 4})


def _markers(facts: Facts) -> dict[str, Any]:
    """A message of markers, as long as a prompt may be."""
    count = 15 * facts.max_model_len // len("<|user|>")
    return {"messages": [{"role": "user", "content": "<|user|>" * count}], "max_tokens": 4}


NUMBERS = [0] * 1_900_000


def _numbers(_: Facts) -> Iterator[HostileRequest]:
    """Two million numbers in each place that reaches a template or an answer."""
    call = {"function": {"name": "f", "arguments": {"x": NUMBERS}}}
    yield post(CHAT, {"messages": [{**USER[0], "x": NUMBERS}], "max_tokens": 4})
    yield post(CHAT, {"messages": USER, "chat_template_kwargs": {"x": NUMBERS}, "max_tokens": 4})
    yield post(CHAT, {"messages": [*USER, {"role": "assistant", "tool_calls": [call]}, *USER]})
    yield post(CHAT, _calls({"x": NUMBERS}, "auto"))
    form = {"format": {"type": "text", "x": NUMBERS}}
    yield post(RESPONSES, {"input": "a", "text": form, "max_output_tokens": 4})
    block = {"type": "tool_use", "id": "a", "name": "f", "input": {"x": NUMBERS}}
    turns = [*USER, {"role": "assistant", "content": [block]}, *USER]
    yield post(MESSAGES, {"messages": turns, "max_tokens": 4})


def _blocks(kind: str) -> dict[str, Any]:
    """12 MB of text in 4,000 blocks of one message."""
    turn = {"role": "assistant", "content": [{"type": kind, kind: "a" * 3000}] * 4000}
    return {"messages": [*USER, turn, *USER], "max_tokens": 4}


def _abandoned(_: Facts) -> Iterator[HostileRequest]:
    """Work of each kind, many times."""
    bodies = [
        _calls(ladder(150, 4)),
        _calls(repeated_values("allOf", SCHEMA_BYTES)),
        {"messages": [{**USER[0], "x": NUMBERS}]},
        {"messages": [{"role": "user", "content": "<|user|>" * 15_000}]},
    ]
    made = [post(CHAT, body) for body in bodies]
    for _number in range(16):
        yield from made


def _streams(count: int) -> Any:
    body = {"prompt": "a", "stream": True, "max_tokens": 64, "ignore_eos": True}
    return one(COMPLETIONS, lambda _: body, count)


WORK: dict[str, Case] = {
    "4 ladders of alternatives, left": Case(
        one(CHAT, lambda _: _calls(ladder(150, 4)), 4), at_once=4, leaves_s=0.3, flags=GLM_CALLS
    ),
    "schemas that repeat their parts, GLM": Case(_schemas, at_once=4, flags=GLM_CALLS, patience=3),
    "schemas that repeat their parts, V3.1": Case(_schemas, at_once=4, flags=V31_CALLS, patience=3),
    "shared definitions of 1 MB": Case(
        one(CHAT, lambda _: _calls(shared_definitions(1000, 40_000))), flags=V31_CALLS
    ),
    "200 grammars, left": Case(_grammars, at_once=16, leaves_s=0.1),
    "an ambiguous grammar": Case(_ambiguous(1)),
    "8 ambiguous grammars, n = 32": Case(_ambiguous(32, 8), at_once=8),
    "templates that write gigabytes": Case(_templates, at_once=4, flags=TEMPLATES, patience=5),
    "8 messages of markers": Case(one(CHAT, _markers, 8), at_once=8),
    "two million numbers in many places": Case(_numbers, at_once=2, flags=GLM_CALLS, patience=2),
    "12 MB in 4,000 blocks of text": Case(one(MESSAGES, lambda _: _blocks("text"), 4), at_once=4),
    "12 MB in 4,000 blocks of thinking": Case(
        one(MESSAGES, lambda _: _blocks("thinking"), 4), at_once=4
    ),
    "64 heavy chats, left": Case(_abandoned, at_once=8, leaves_s=0.3, flags=GLM_CALLS),
    "2,000 streams at once": Case(_streams(2000), hold_s=20),
    "64 clients that end their sending": Case(_streams(64), at_once=64, ends_sending=True),
    "a metadata text of 15 MB": Case(
        one(RESPONSES, lambda _: {"input": "a", "user": "\u00e9" * (7 * MEGABYTE)})
    ),
}
"""A case for each finding of the second attack that is a request, and neighbours of its kind."""
