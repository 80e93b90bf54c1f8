"""Text of grammars in llguidance's variant of Lark.

Source of the syntax: `docs/syntax.md` of guidance-ai/llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from fd_dsa.cancellation import check_cancelled
from fd_dsa.chat.patterns import ANY_TEXT

# of all grammars of one request; a literal of that size takes 10 ms a step
MAX_GRAMMAR_CHARS = 32_768
# between two signs of JSON; without a bound a small model may write spaces until max_tokens
_JSON_SPACE = "[ \\t\\n\\r]{1,40}"
# \u would let a name be written in two ways, and llguidance would take it for two properties
_ESCAPES = 'nrbtf\\"'
# lenient: llguidance warns of a keyword that it cannot enforce, and of an unknown format
JSON_OPTIONS = {
    "whitespace_pattern": _JSON_SPACE,
    "json_allowed_escapes": _ESCAPES,
    "lenient": True,
}
# llguidance reads it together with texts, as neither has anything to skip
_COMPACT = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": _ESCAPES,
    "lenient": True,
}


def check_size(num_chars: int) -> None:
    """ValueError for a grammar that has more characters than may be compiled."""
    if num_chars > MAX_GRAMMAR_CHARS:
        raise ValueError(
            f"the grammar has {num_chars} characters or more; at most {MAX_GRAMMAR_CHARS} are "
            "allowed"
        )


class Lark:
    """Rules and terminals of a grammar while it is written; equal ones are written once."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._num_chars = 0
        self._checked: list[str] = []

    def grammar(self, start: str) -> str:
        """The whole text with the rule `start`."""
        if self._checked:
            # no text matches the terminal
            never = self.terminal('"a" & "b"')
            start = f"{start} | {never} {self.one_of(self._checked)}"
        return "\n".join([f"start: {start}", *(n + body for body, n in self._names.items()), ""])

    def check(self, document: Mapping[str, object]) -> None:
        """Make llguidance refuse the whole grammar if no value satisfies a schema."""
        rule = self.json(document)
        if rule not in self._checked:
            self._checked.append(rule)

    def rule(self, body: str, options: str = "") -> str:
        """Name of a rule."""
        return self._named("r", f"{options}: {body}")

    def terminal(self, body: str) -> str:
        """Name of a terminal; its body has regexes, literals, terminals and `|`, `&`, `~`."""
        return self._named("T", f": {body}")

    def regex(self, regex: str) -> str:
        """Name of a terminal for a regex in Rust's syntax."""
        return self.terminal(f"/{_escaped(regex)}/")

    def literal(self, text: str) -> str:
        """An expression for a text."""
        return json.dumps(text, ensure_ascii=False)

    def one_of(self, choices: Iterable[str]) -> str:
        """Name of a rule for one of several expressions."""
        return self.rule(" | ".join(choices))

    def text_until(self, end: str, text: str | None = None) -> str:
        """Name of a rule for a text up to the first `end`, and that.

        Args:
            text: the terminal for the text; None: any text.
        """
        body = self.regex(ANY_TEXT) if text is None else text
        return self.rule(body, f"[suffix={self.literal(end)}]")

    def json(self, document: Mapping[str, object], compact: bool = False) -> str:
        """Name of a rule for a JSON value; compact: with at most a space after , and :."""
        body = {**document, "x-guidance": _COMPACT if compact else JSON_OPTIONS}
        return self.rule(f"%json {json.dumps(body, ensure_ascii=False)}")

    def _named(self, kind: str, body: str) -> str:
        if body not in self._names:
            check_cancelled()
            self._num_chars += len(body)
            check_size(self._num_chars)
            self._names[body] = f"{kind}{len(self._names)}"
        return self._names[body]


def _escaped(regex: str) -> str:
    """A regex between slashes, without those and line breaks inside."""
    return regex.replace("/", "\\/").replace("\n", "\\n").replace("\r", "\\r")
