"""Form of an output: a JSON schema, a regular expression, choices or a grammar."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from fd_dsa.chat.json_text import is_unicode, json_start
from fd_dsa.chat.lark import MAX_GRAMMAR_CHARS
from fd_dsa.engine.argument_hints import FORM_HINTS
from fd_dsa.engine.arguments import explain_fields
from fd_dsa.errors import argument_error
from fd_dsa.grammars.messages import Kind

_FORMS = ("json", "json_object", "regex", "choice", "grammar")


@explain_fields(FORM_HINTS)
@dataclass(frozen=True)
class StructuredOutputsParams:
    """Form that an output must have: exactly one of the first five arguments.

    Names and meanings are vLLM's.

    Args:
        json: JSON schema of the output, as a dict or as its text.
        json_object: True = any JSON object.
        regex: regular expression that the whole output matches, in Rust's syntax, which has no
            look-around.
        choice: texts, one of which is the output.
        grammar: context-free grammar in Lark's notation or in GBNF.
        alternative: second form, without an alternative of its own. The output has either form. An
            output whose beginning fits both may be bound to one of them.
        source: name of the form in error messages: the field of the request.

    Raises:
        ArgumentError: an argument has an unknown name or another type.
        ValueError: no form or several are given, or the form is invalid or too large. The message
            begins with `source`.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    alternative: StructuredOutputsParams | None = None
    source: str = "structured_outputs"

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise argument_error("json_object", self.json_object, "True or False")
        if not isinstance(self.alternative, (StructuredOutputsParams, NoneType)):
            rule = "a StructuredOutputsParams"
            raise argument_error("alternative", self.alternative, rule)
        forms = [name for name in _FORMS if getattr(self, name) not in (None, False)]
        if len(forms) != 1:
            names = " and ".join(forms) or "no form"
            raise ValueError(f"{self.source} has {names}; give one of {', '.join(_FORMS)}")
        if self.alternative is not None and self.alternative.alternative is not None:
            raise ValueError(
                f"{self.source} has an alternative with an alternative; give one alternative"
            )
        # raises an error if the type is wrong
        _, text = self.definition()
        self._check_length(text)

    def either(self) -> tuple[StructuredOutputsParams, ...]:
        """Return the form, and its alternative if it has one."""
        return (self,) if self.alternative is None else (self, self.alternative)

    def definition(self) -> tuple[Kind, str]:
        """Return the notation of the form, and its text."""
        if self.json_object:
            return "json_schema", '{"type": "object"}'
        if self.json is not None:
            return "json_schema", self._schema_text(self.json)
        if self.choice is not None:
            return "lark", self._choice_text(self.choice)
        kind: Kind = "grammar" if self.regex is None else "regex"
        text = self.grammar if self.regex is None else self.regex
        if not isinstance(text, str) or not text:
            raise ValueError(
                f"{self.source} is {reprlib.repr(text)}; it must be a non-empty string"
            )
        return kind, self._utf8(text)

    def _schema_text(self, schema: object) -> str:
        """Return the text of a schema."""
        if isinstance(schema, str):
            return self._utf8(schema)
        if not isinstance(schema, Mapping):
            raise ValueError(
                f"{self.source} is {reprlib.repr(schema)}; it must be a JSON schema, an object"
            )
        try:
            return json_start(schema, MAX_GRAMMAR_CHARS, ensure_ascii=True)
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{self.source} cannot be written as JSON: {error}") from error

    def _choice_text(self, choice: Any) -> str:
        """Return a grammar with one terminal, because many choices as rules would be slow."""
        is_list = isinstance(choice, Sequence) and not isinstance(choice, str)
        if not is_list or not choice or not all(isinstance(text, str) and text for text in choice):
            raise ValueError(
                f"{self.source} has {reprlib.repr(choice)}; it must be a list of one or more "
                "texts, none empty"
            )
        quoted = (json.dumps(self._utf8(text), ensure_ascii=False) for text in choice)
        return "start: CHOICE\nCHOICE: " + " | ".join(quoted)

    def _utf8(self, text: str) -> str:
        """Return a text after a check that it is valid Unicode."""
        self._check_length(text)
        if not is_unicode(text):
            raise ValueError(
                f"{self.source} has the text {reprlib.repr(text)}; it must be valid Unicode"
            )
        return text

    def _check_length(self, text: str) -> None:
        """Raise ValueError if a text is too long to be compiled."""
        if len(text) > MAX_GRAMMAR_CHARS:
            raise ValueError(
                f"{self.source} has {len(text)} characters or more; at most {MAX_GRAMMAR_CHARS} "
                "are allowed"
            )
