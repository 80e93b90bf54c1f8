"""Jinja environment of chat templates: a sandbox with the names that templates expect."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# limits of the result of one multiplication or power
_MAX_ENTRIES, _MAX_BITS = 1 << 20, 1 << 12


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of transformers, with bounds on the values that one operator makes.

    Differences from Jinja's own sandbox: `tojson` does not escape HTML and takes the arguments of
    `json.dumps`; `{% generation %}` marks text for training and shows its body; `{% break %}`,
    `{% continue %}`, `raise_exception` and `strftime_now` exist; namespaces have no attribute that
    begins with an underscore; `dict` gives no access to the type.

    `lipsum` does not exist, because it makes a text of any length. No product or power makes a
    giant text, list or number.

    Source: `transformers.utils.chat_template_utils`, read for its names and arguments.
    """

    # an intercepted operator is not computed while a template is compiled
    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            namespace=_Namespace,
            dict=_Dict(),
        )

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        counts = [value for value in (left, right) if isinstance(value, int)]
        texts = [value for value in (left, right) if isinstance(value, str | bytes | list | tuple)]
        if texts and counts and len(texts[0]) * counts[0] > _MAX_ENTRIES:
            raise SecurityError(
                f"'*' would make a text or list of more than {_MAX_ENTRIES} entries"
            )
        if len(counts) == 2:
            bits = left.bit_length()
            bits = bits + right.bit_length() if operator == "*" else bits * right
            if bits > _MAX_BITS:
                raise SecurityError(
                    f"{operator!r} would make a number of more than {_MAX_BITS} bits"
                )
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`: a scope of its own that shows its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` stays free as a name of the template's
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict` without the methods of the type, which would change the caller's messages."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """Return a dict with these keys and one value for all."""
        return dict.fromkeys(keys, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace: got the name {name!r}; must not begin with an underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
