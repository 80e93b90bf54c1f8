"""Grammars that force tool calls, in llguidance's variant of Lark.

`tool_choice` "required", or the name of a tool, is kept by decoding under a grammar of the model's
own format, so that the same parser reads forced and free calls.

Source of the syntax: `docs/syntax.md` of guidance-ai/llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fd_dsa.chat import tool_formats as marks
from fd_dsa.chat.events import types_of

_ANY_TEXT = "(?s:.*)"
# in DSML, between the name of an argument and its value
_STRING = '" string="{}">'
# between two signs of JSON; without a bound a small model may write spaces until max_tokens.
# Lenient: the caller is warned of keywords that cannot be enforced, and of unknown formats
JSON_OPTIONS = {"whitespace_pattern": "[ \\t\\n\\r]{1,40}", "lenient": True}


def forced_calls_grammar(tool_format: str, schemas: Mapping[str, Any], *, several: bool) -> str:
    """A grammar of answers that call at least one of the tools and say nothing else.

    Args:
        schemas: name of each tool that may be called -> JSON schema of its arguments.

    Returns:
        Lark text with the rule `start`.
    """
    lark = _Lark()
    head, call, tail = _FORMS[tool_format]
    calls = lark.one_of([call(lark, name, schema) for name, schema in schemas.items()])
    parts = [lark.literal(head), f"{calls}+" if several else calls, lark.literal(tail)]
    return lark.grammar(" ".join(parts))


class _Lark:
    """Rules of a grammar while it is made."""

    def __init__(self) -> None:
        self._rules: list[str] = []

    def grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules, ""])

    def rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def literal(self, text: str) -> str:
        """An expression for a text."""
        return json.dumps(text, ensure_ascii=False)

    def one_of(self, choices: Iterable[str]) -> str:
        """Name of a rule for one of several expressions."""
        return self.rule(" | ".join(choices))

    def json(self, schema: Any, root: Any = None) -> str:
        """Name of a rule for a JSON value.

        Args:
            root: the schema that holds the definitions which `schema` refers to.
        """
        body = dict(schema) if isinstance(schema, dict) else {}
        for key in ("$defs", "definitions"):
            if isinstance(root, dict) and key in root:
                body.setdefault(key, root[key])
        body.setdefault("x-guidance", JSON_OPTIONS)
        return self.rule(f"%json {json.dumps(body, ensure_ascii=False)}")

    def text_until(self, end: str) -> str:
        """Name of a rule for any text up to the first `end`, and that."""
        return self.rule(f"/{_ANY_TEXT}/", f"[suffix={self.literal(end)}]")


def _v31_call(lark: _Lark, name: str, schema: Any) -> str:
    head = lark.literal(marks.V31_CALL + name + marks.V31_SEPARATOR)
    # an object whatever the schema says
    arguments = lark.json({"type": "object", **(schema or {})})
    return f"{head} {arguments} {lark.literal(marks.V31_CALL_END)}"


def _v32_call(lark: _Lark, name: str, schema: Any) -> str:
    head = lark.literal(f'{marks.V32_CALL} name="{name}">\n')
    empty = [] if _required(schema) else [lark.literal("\n")]
    body = lark.one_of([_arguments(lark, schema, _v32_argument), *empty])
    return f"{head} {body} {lark.literal(marks.V32_CALL_END)} {lark.literal(chr(10))}"


def _v32_argument(lark: _Lark, name: str | None, schema: Any, root: Any) -> str:
    """One argument of a call of DeepSeek-V3.2 or V4; of any name where that is None."""
    head = lark.literal(f'{marks.V32_ARGUMENT} name="')
    key = r'/[^"<>\n]+/' if name is None else lark.literal(name)
    types = types_of(schema, root)
    forms = []
    if not types or "string" in types:
        text = _text(lark, schema, f"{marks.V32_ARGUMENT_END}\n")
        forms.append(f"{lark.literal(_STRING.format('true'))} {text}")
    if types != {"string"}:
        end = lark.literal(f"{marks.V32_ARGUMENT_END}\n")
        forms.append(f"{lark.literal(_STRING.format('false'))} {lark.json(schema, root)} {end}")
    return f"{head} {key} {lark.one_of(forms)}"


def _glm_call(lark: _Lark, name: str, schema: Any) -> str:
    head, arguments = lark.literal(marks.GLM_CALL + name), _arguments(lark, schema, _glm_argument)
    return f"{head} {arguments} {lark.literal(marks.GLM_CALL_END)}"


def _glm_argument(lark: _Lark, name: str | None, schema: Any, root: Any) -> str:
    """One argument of a call of GLM; of any name where that is None."""
    head = lark.literal(marks.GLM_KEY)
    key = r"/[^<>\n]+/" if name is None else lark.literal(name)
    middle = lark.literal(marks.GLM_KEY_END + marks.GLM_VALUE)
    types = types_of(schema, root)
    if types and "string" not in types:
        value = f"{lark.json(schema, root)} {lark.literal(marks.GLM_VALUE_END)}"
    else:
        value = _text(lark, schema if types == {"string"} else None, marks.GLM_VALUE_END)
    return f"{head} {key} {middle} {value}"


def _arguments(lark: _Lark, schema: Any, argument: Any) -> str:
    """Name of a rule for the arguments of a call, in the order of the schema's properties."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        # an object of which nothing is known
        return lark.rule(f"({argument(lark, None, None, None)})*")
    required = _required(schema)
    parts = []
    for name, of_name in properties.items():
        one = lark.rule(argument(lark, name, of_name, schema))
        parts.append(one if name in required else f"{one}?")
    return lark.rule(" ".join(parts) or '""')


def _text(lark: _Lark, schema: Any, end: str) -> str:
    """A text up to its end, one of the schema's where it lists them."""
    values = schema.get("enum") if isinstance(schema, dict) else None
    if isinstance(values, list) and values and all(isinstance(v, str) for v in values):
        return lark.one_of(lark.literal(f"{value}{end}") for value in values)
    return lark.text_until(end)


def _required(schema: Any) -> Sequence[str]:
    names = schema.get("required") if isinstance(schema, dict) else None
    return names if isinstance(names, list) else []


# format -> what is before all calls, how one is made, what is after them
_FORMS: dict[str, tuple[str, Callable[[_Lark, str, Any], str], str]] = {
    "deepseek_v31": (marks.V31_CALLS, _v31_call, marks.V31_CALLS_END),
    "deepseek_v32": (f"\n\n{marks.V32_CALLS}\n", _v32_call, marks.V32_CALLS_END),
    "deepseek_v4": (f"\n\n{marks.V4_CALLS}\n", _v32_call, marks.V4_CALLS_END),
    "glm47": ("", _glm_call, ""),
}
