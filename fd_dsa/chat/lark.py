"""Text of grammars in llguidance's variant of Lark.

Source of the syntax: `docs/syntax.md` of guidance-ai/llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from fd_dsa.cancellation import check_cancelled
from fd_dsa.chat.patterns import ANY_TEXT

# limit of all grammars of one request; a literal of this size takes 10 ms a step
MAX_GRAMMAR_CHARS = 32_768
# white space in JSON, bounded because a small model may write spaces until max_tokens
_JSON_SPACE = "[ \\t\\n\\r]{1,40}"
# without \u, because llguidance would take two spellings of a name for two properties
_ESCAPES = 'nrbtf\\"'
# lenient: llguidance only warns of keywords that it cannot enforce and of unknown formats
JSON_OPTIONS = {
    "whitespace_pattern": _JSON_SPACE,
    "json_allowed_escapes": _ESCAPES,
    "lenient": True,
}
# llguidance reads this JSON together with texts, because neither skips white space
_COMPACT = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": _ESCAPES,
    "lenient": True,
}


def check_size(num_chars: int) -> None:
    """Raise ValueError for a grammar that is too large to be compiled."""
    if num_chars > MAX_GRAMMAR_CHARS:
        raise ValueError(
            f"the grammar has {num_chars} characters or more; at most {MAX_GRAMMAR_CHARS} are "
            "allowed"
        )


class Lark:
    """Rules and terminals of a grammar under construction, without duplicates."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._num_chars = 0
        self._checked: list[str] = []

    def grammar(self, start: str) -> str:
        """Return the whole text with the rule `start`."""
        if self._checked:
            # a terminal that matches no text
            never = self.terminal('"a" & "b"')
            start = f"{start} | {never} {self.one_of(self._checked)}"
        return "\n".join([f"start: {start}", *(n + body for body, n in self._names.items()), ""])

    def check(self, document: Mapping[str, object]) -> None:
        """Make llguidance refuse the whole grammar if no value satisfies a schema."""
        rule = self.json(document)
        if rule not in self._checked:
            self._checked.append(rule)

    def rule(self, body: str, options: str = "") -> str:
        """Add a rule and return its name."""
        return self._named("r", f"{options}: {body}")

    def terminal(self, body: str) -> str:
        """Add a terminal of regexes, literals, terminals, `|`, `&`, `~` and return its name."""
        return self._named("T", f": {body}")

    def regex(self, regex: str) -> str:
        """Add a terminal for a regex in Rust's syntax and return its name."""
        return self.terminal(f"/{_escaped(regex)}/")

    def literal(self, text: str) -> str:
        """Return an expression for a text."""
        return json.dumps(text, ensure_ascii=False)

    def one_of(self, choices: Iterable[str]) -> str:
        """Add a rule for one of several expressions and return its name."""
        return self.rule(" | ".join(choices))

    def text_until(self, end: str, text: str | None = None) -> str:
        """Add a rule for a text up to and with the first `end`, and return its name.

        Args:
            text: the terminal for the text. None = any text.
        """
        body = self.regex(ANY_TEXT) if text is None else text
        return self.rule(body, f"[suffix={self.literal(end)}]")

    def json(self, document: Mapping[str, object], compact: bool = False) -> str:
        """Add a rule for a JSON value and return its name.

        Args:
            compact: allow at most one space, and only after comma and colon.
        """
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
    """Escape slashes and line breaks in a regex that is written between slashes."""
    return regex.replace("/", "\\/").replace("\n", "\\n").replace("\r", "\\r")
