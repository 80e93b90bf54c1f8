"""Forms of outputs as grammars for llguidance, and its messages in our wording.

Source of the notation: `docs/syntax.md` and `docs/json_schema.md` of guidance-ai/llguidance.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Container, Iterable, Iterator
from typing import Any

from fd_dsa.chat.enforced import has_no_effect
from fd_dsa.chat.exact_numbers import LOWER, UPPER, check_constant, exact_pattern, inner_bound
from fd_dsa.chat.json_text import NOT_UNICODE, is_unicode
from fd_dsa.chat.lark import JSON_OPTIONS
from fd_dsa.chat.patterns import full_regex
from fd_dsa.grammars.messages import Kind

# any tokenization of a text is allowed, because llguidance's forced tokens may differ from the
# tokenizer's
_HEAD = '%llguidance {"no_forcing": true}\nstart: '
# a string, a comment, a regular expression, or a token by its name
_LARK_PART = re.compile(r'"(?:\\.|[^"\\\n])*"|(?://|#).*|/(?:\\.|[^/\\\n])+/|<[^<>\s]+>')
_QUOTATION = re.compile(r"^ *\d+ \| ", re.MULTILINE)
_SHOWN_ERROR_CHARS = 300
COMPILE_FUEL, TOKEN_FUEL = 300_000, 200_000
"""Limits of llguidance's lexer steps: to compile a grammar, to consume a token."""
# reasons of llguidance that clients cannot understand
_PLAIN_REASONS = {
    "fuel": (
        f"the grammar is too complex: its regular expressions take more than {COMPILE_FUEL:,} "
        f"steps to compile, or {TOKEN_FUEL:,} for a token"
    ),
    "NoExtensionBias": "no text satisfies it",
    "Regex is empty": "no text satisfies a pattern",
}
_PLAIN_REASONS["too many expressions constructed"] = _PLAIN_REASONS["fuel"]
_NAMED_SCHEMAS = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
"""Keywords whose keys are names, so that a property may be called `const`."""
_ANNOTATIONS = frozenset({"default", "example", "examples"})
# JSON Schema treats an unknown format as an annotation
_HARMLESS = "Unknown format"
_ONE_OF = (
    "oneOf: several of its schemas may hold at once, which a grammar cannot exclude; use anyOf"
)


def grammar_text(forms: Iterable[tuple[Kind, str]], names: Container[bytes]) -> str:
    """Return a grammar for outputs that have one of several forms.

    Args:
        names: texts that a grammar may use as names of tokens. They are replaced by literal texts.

    Raises:
        ValueError, RecursionError: a form is invalid.
    """
    entries = [{**_entry(*form, names), "name": f"f{i}"} for i, form in enumerate(forms)]
    start = " | ".join(f"@{entry['name']}" for entry in entries)
    return json.dumps({"grammars": [{"lark_grammar": _HEAD + start}, *entries]})


def _entry(kind: Kind, text: str, names: Container[bytes]) -> dict[str, Any]:
    """Return a form as an entry of llguidance's list of grammars."""
    from llguidance import grammar_from
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if kind == "json_schema":
        schema = _for_llguidance(json.loads(text))
        if not is_unicode(json.dumps(schema, ensure_ascii=False)):
            raise ValueError(NOT_UNICODE)
        if isinstance(schema, dict):
            given = schema.get("x-guidance", {})
            schema["x-guidance"] = {**JSON_OPTIONS, **given} if isinstance(given, dict) else given
        return {"json_schema": schema}
    if kind == "regex":
        (entry,) = json.loads(grammar_from(kind, text))["grammars"]
        return {"lark_grammar": entry["lark_grammar"]}
    if kind == "grammar" and _is_gbnf(text):
        try:
            text = gbnf_to_lark(text)
        except Exception as error:
            raise ValueError(f"got GBNF that cannot be converted to Lark: {error}") from error

    def spelled(match: re.Match[str]) -> str:
        is_name = match[0].startswith("<") and match[0].encode() in names
        return json.dumps(match[0], ensure_ascii=False) if is_name else match[0]

    return {"lark_grammar": _LARK_PART.sub(spelled, text)}


def _for_llguidance(schema: Any) -> Any:
    """Return a schema whose bounds and patterns llguidance reads exactly.

    Keywords that it does not know are left out if they have no effect.

    Raises:
        ValueError: a value cannot be enforced exactly. The message begins with its keyword.
    """
    if isinstance(schema, list):
        return [_for_llguidance(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key, value in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(value, dict):
            names = [_pattern(name, key) if key == "patternProperties" else name for name in value]
            if len(set(names)) < len(names):
                raise ValueError(f"{key}: two patterns are the same; give each one once")
            made[key] = dict(zip(names, map(_for_llguidance, value.values()), strict=True))
        elif key == "pattern" and isinstance(value, str):
            made[key] = _pattern(value, key)
        elif key in (*LOWER, *UPPER) and isinstance(value, int | float):
            with _named(key):
                made[key] = inner_bound(key, value)
        elif key in ("const", "enum"):
            with _named(key):
                _check_constants(value)
        elif has_no_effect(key, value):
            del made[key]
        elif key not in _ANNOTATIONS:
            made[key] = _for_llguidance(value)
    return made


def _pattern(text: str, keyword: str) -> str:
    """Return a pattern that llguidance reads exactly."""
    try:
        regex = f"^(?:{full_regex(text)})$"
    except ValueError:
        # a pattern in the syntax of Rust, which has more
        regex = text
    with _named(keyword):
        return exact_pattern(regex)


def _check_constants(value: object) -> None:
    """Raise ValueError for a value that llguidance changes, anywhere in a value."""
    check_constant(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        _check_constants(part)


@contextlib.contextmanager
def _named(keyword: str) -> Iterator[None]:
    """Put the keyword in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{keyword}: {error}") from error


def _is_gbnf(text: str) -> bool:
    """Return True if a grammar defines its rules by `::=`, which Lark does not have."""
    return "::=" in _LARK_PART.sub("", text)


def refusal(warnings: Iterable[str]) -> str | None:
    """Return a constraint that llguidance has dropped from a grammar, or None."""
    dropped = [one_line(text) for text in warnings if not text.startswith(_HARMLESS)]
    if not dropped:
        return None
    return _ONE_OF if dropped[0].startswith("oneOf") else dropped[0]


def is_panic(error: BaseException) -> bool:
    """Return True for a panic of llguidance's Rust code, which is not an `Exception`."""
    return type(error).__name__ == "PanicException"


def one_line(error: str) -> str:
    """Return an error of llguidance as one line, without its quotation of the grammar."""
    own = _QUOTATION.split(error.replace("<non-verbose/>", ""))[0]
    text = " ".join(own.partition("<backtrace>")[0].split())
    for part, reason in _PLAIN_REASONS.items():
        if part in text:
            return reason
    return text if len(text) <= _SHOWN_ERROR_CHARS else text[:_SHOWN_ERROR_CHARS] + "..."
