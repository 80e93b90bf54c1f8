"""Random calls, written as the models write them, and slips in their markup."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fd_dsa.chat.events import ToolCall
from fd_dsa.chat.parser import TOOL_FORMATS, ToolFormat

TOOLS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "hours": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["city", "days", "hours"],
    },
    "write_file": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "text": {"type": "string"},
            "mode": {"type": ["string", "null"]},
            "options": {"type": "object"},
        },
    },
    "now": {"type": "object", "properties": {}},
}
_WORDS = (
    "a",
    "go on",
    "=",
    "\n",
    " ",
    "<b>",
    "</b>",
    "x > y",
    '"',
    "\\",
    "'",
    "京",
    "{",
    "}]",
    "3",
)
MARKS = tuple(
    sorted(
        {mark for known in TOOL_FORMATS.values() for mark in known.markers if mark[0] == "<"}
        | {f"<{s}｜DSML｜{n}" for s in ("", "/") for n in ("invoke", "parameter")}
        | {f"</｜DSML｜{n}>" for n in ("invoke", "parameter", "function_calls", "tool_calls")}
        | {"<｜DSML｜function_calls>", "<｜DSML｜tool_calls>", "<think>", "</think>", "｜DSML｜"}
    )
)
Piece = tuple[str, bool]
"""Text of a written call, and if that is markup."""


@dataclass(frozen=True)
class Call:
    """A call before it is written."""

    name: str
    arguments: Mapping[str, Any]


def random_calls(rng: random.Random, marks: float) -> list[Call]:
    """One or two calls; a share of the pieces of their texts are marks."""
    calls = []
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(TOOLS))
        properties = TOOLS[name]["properties"]
        keys = [key for key in properties if rng.random() < 0.7]
        calls.append(Call(name, {key: _value(rng, properties[key], marks) for key in keys}))
    return calls


def _value(rng: random.Random, schema: Mapping[str, Any], marks: float) -> Any:
    if schema["type"] == "integer":
        return rng.randrange(100)
    if schema["type"] == "array":
        return [rng.randrange(24) for _ in range(rng.randrange(4))]
    if schema["type"] == "object":
        return {_text(rng, marks): [_text(rng, marks), None, 1.5]}
    text = _text(rng, marks)
    return rng.choice((None, f"{text}.")) if isinstance(schema["type"], list) else text


def _text(rng: random.Random, marks: float) -> str:
    some = [rng.choice(MARKS if rng.random() < marks else _WORDS) for _ in range(rng.randrange(9))]
    return "".join(some)


def _v31(calls: Sequence[Call]) -> list[Piece]:
    pieces = [("<｜tool▁calls▁begin｜>", True)]
    for call in calls:
        pieces += [("<｜tool▁call▁begin｜>", True), (call.name, False), ("<｜tool▁sep｜>", True)]
        pieces += _json(call.arguments)
        pieces += [("<｜tool▁call▁end｜>", True)]
    return [*pieces, ("<｜tool▁calls▁end｜>", True)]


def _json(value: Any) -> list[Piece]:
    """Pieces of a JSON text; its signs are markup."""
    text = json.dumps(value, ensure_ascii=False)
    pieces: list[Piece] = []
    for string, sign, other in re.findall(
        r'"((?:[^"\\]|\\.)*)"|([{}\[\],:])|([^"{}\[\],:]+)', text
    ):
        quoted = [('"', True), (string, False), ('"', True)]
        pieces += quoted if not sign and not other else [(sign or other, bool(sign))]
    return pieces


def _dsml(section: str) -> Callable[[Sequence[Call]], list[Piece]]:
    def write(calls: Sequence[Call]) -> list[Piece]:
        pieces = [("\n\n", True), (f"<｜DSML｜{section}>", True), ("\n", True)]
        for call in calls:
            pieces += [("<｜DSML｜invoke", True), (" name=", True), ('"', True)]
            pieces += [(call.name, False), ('"', True), (">", True), ("\n", True)]
            for key, value in call.arguments.items():
                string = "true" if isinstance(value, str) else "false"
                pieces += [("<｜DSML｜parameter", True), (" name=", True), ('"', True)]
                pieces += [(key, False), ('"', True), (f' string="{string}"', True), (">", True)]
                pieces += [(_plain(value), False), ("</｜DSML｜parameter>", True), ("\n", True)]
            pieces += [("</｜DSML｜invoke>", True), ("\n", True)]
        return [*pieces, (f"</｜DSML｜{section}>", True)]

    return write


def _glm(line: str) -> Callable[[Sequence[Call]], list[Piece]]:
    def write(calls: Sequence[Call]) -> list[Piece]:
        pieces: list[Piece] = []
        for call in calls:
            pieces += [(line, True), ("<tool_call>", True), (call.name, False), (line, True)]
            for key, value in call.arguments.items():
                pieces += [("<arg_key>", True), (key, False), ("</arg_key>", True), (line, True)]
                pieces += [("<arg_value>", True), (_plain(value), False)]
                pieces += [("</arg_value>", True), (line, True)]
            pieces += [("</tool_call>", True)]
        return [piece for piece in pieces if piece[0] or not piece[1]]

    return write


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


WRITERS: dict[str, Callable[[Sequence[Call]], list[Piece]]] = {
    "deepseek_v31": _v31,
    "deepseek_v32": _dsml("function_calls"),
    "deepseek_v4": _dsml("tool_calls"),
    "glm45": _glm("\n"),
    "glm47": _glm(""),
}

_DSML_BOUND = re.compile(
    r"</｜DSML｜parameter>\s*(<｜DSML｜(parameter|invoke)|</｜DSML｜(invoke|function_calls|tool_calls)>)"
    r"|</｜DSML｜invoke>\s*(</｜DSML｜(function_calls|tool_calls)>|<｜DSML｜invoke)"
)
_GLM_BOUND = re.compile(r"</arg_value>\s*(<arg_key>|</tool_call>)")


def is_ambiguous(known: ToolFormat, calls: Sequence[Call]) -> bool:
    """Return True if a text looks like the end of its value, by the rule of docs/chat.md."""
    bound = {"deepseek_v31": None, "glm47": _GLM_BOUND}.get(known.name, _DSML_BOUND)
    values = [value for call in calls for value in call.arguments.values()]
    texts = [value for value in values if isinstance(value, str)]
    return bound is not None and any(map(bound.search, texts))


def meant(call: ToolCall) -> Call | None:
    """A call as it was before it was written; None if its arguments are no JSON."""
    try:
        return Call(call.name, json.loads(call.arguments))
    except ValueError:
        return None


def slip(rng: random.Random, pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces of a call with one slip in the markup."""
    damaged = list(pieces)
    places = [place for place, (text, is_markup) in enumerate(pieces) if is_markup and text.strip()]
    at = rng.choice(places)
    text = pieces[at][0]
    inside = rng.randrange(len(text))
    kind = rng.choice(("drop", "double", "swap", "head", "tail", "lose", "repeat", "turn"))
    if kind == "swap":
        # two values of one attribute make another call that is sound
        others = [place for place in places if not pieces[place][0].startswith(" string")]
        other = rng.choice(others)
        if any(
            pieces[place + 1 :] and pieces[place + 1][0].startswith(pieces[place][0])
            for place in (at, other)
        ):
            # the value begins with the mark that is lost before it, so nothing is lost
            return damaged
        damaged[at], damaged[other] = pieces[other], pieces[at]
        return damaged
    damaged[at] = (
        {
            "drop": "",
            "double": text + text,
            "head": text[:inside],
            "tail": text[inside:],
            "lose": text[:inside] + text[inside + 1 :],
            "repeat": text[: inside + 1] + text[inside:],
            "turn": text[:inside] + text[inside:][:2][::-1] + text[inside + 2 :],
        }[kind],
        True,
    )
    return damaged
