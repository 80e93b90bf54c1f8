"""Jinja environment of chat templates: a sandbox with the expected names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from sys import getsizeof
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, missing, pass_context

from fd_dsa.chat.budget import (
    OverBudget,
    PromptTooLong,
    add,
    compared,
    concat,
    concat_values,
    current,
    divide,
    finalize,
    multiply,
    negate,
    power,
    slice_of,
    subtract,
    to_text,
)
from fd_dsa.chat.filters import TEMPLATE_FILTERS
from fd_dsa.chat.jinja_tests import TEMPLATE_TESTS
from fd_dsa.chat.methods import METHODS, call_method, format_text, from_keys, make_dict, modulo
from fd_dsa.chat.rewriting import rewrite

_MAX_TIME_FORMAT = 1000
_NAMES_OF_DICT = frozenset(dir(dict))
# bytes counted for a call and its overhead
_CALL_BYTES = 32


@pass_context
def _tick(context: object, num_bytes: int) -> None:
    """Count a step of a loop, or a call of a macro."""
    current().spend(num_bytes)


@pass_context
def _ticked(context: object, value: object, num_bytes: int) -> Any:
    current().spend(num_bytes)
    return value


OPERATORS: dict[str, Callable[..., Any]] = {
    # names that no template can write
    "+": add,
    "-": subtract,
    "(-)": negate,
    "//": divide,
    "*": multiply,
    "**": power,
    "%": modulo,
    "~": concat_values,
    "[:]": slice_of,
    "(compared)": compared,
    "(key)": lambda value: current().check_key(value),
    "(tick)": _tick,
    "(ticked)": _ticked,
}
"""Operators and steps of the compiled template."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of transformers, with a budget for each rendering.

    Differences from Jinja's own sandbox: `tojson` does not escape HTML and has the arguments of
    `json.dumps`. `{% generation %}` marks text for training and shows its body. `{% break %}`, `{%
    continue %}`, `raise_exception` and `strftime_now` exist. Namespaces have no attribute that
    begins with an underscore. `dict` gives no access to the type.

    Templates are compiled inside `bounded_compilation` and rendered inside `bounded_rendering`.
    Each operator, filter, test, method, loop and call counts the bytes of its result. The rendering
    ends when its bytes or its time are used up. `lipsum`, `{% autoescape %}` and the methods that
    make bytes or tables of characters do not exist.

    Source: `transformers.utils.chat_template_utils`, read for its names and arguments.
    """

    concat = staticmethod(concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=finalize,
        )
        del self.globals["lipsum"]
        self.filters = {**TEMPLATE_FILTERS, **OPERATORS}
        self.tests = dict(TEMPLATE_TESTS)
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            namespace=_Namespace,
            dict=_Dict(),
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return rewrite(super()._parse(source, name, filename), self)

    def getattr(self, obj: object, attribute: str) -> Any:
        """Return the attribute of a value, or the entry with this name."""
        # a fast path for names of JSON objects, for which Jinja catches an error first
        if type(obj) is dict and attribute not in _NAMES_OF_DICT:
            if attribute in obj:
                return obj[attribute]
            return self.undefined(obj=obj, name=attribute)
        if type(obj) is _Namespace and not attribute.startswith("_"):
            value = getattr(obj, attribute, missing)
            return self.undefined(obj=obj, name=attribute) if value is missing else value
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        """Return True for names that a template may read."""
        return attr in METHODS.get(type(obj), ()) or super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: object, **kwargs: object) -> Any:
        """Call an object of a template."""
        current().spend(_CALL_BYTES + 8 * (len(args) + len(kwargs)))
        kind = type(obj)
        if kind is BuiltinMethodType or (kind is MethodType and isinstance(obj.__self__, str)):
            # names that the compiled template adds to each call
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return call_method(obj, *args, **kwargs)
        if kind is Macro:
            return context.call(obj, *args, **kwargs)
        if kind is MethodType and isinstance(obj.__self__, LoopContext):
            # loop.changed compares its arguments
            compared(args)
        return super().call(context, obj, *args, **kwargs)

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a filter whose name is a value of the template."""
        if name in OPERATORS:
            raise TemplateError(f"No filter named {name!r}.")
        return super().call_filter(name, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        """Return a bounded function in place of `str.format` and `str.format_map`."""
        kind = type(value)
        if kind is not BuiltinMethodType and kind is not MethodType:
            return None
        text, name = value.__self__, value.__name__
        if name not in ("format", "format_map") or not isinstance(text, str):
            return None
        if name == "format":
            return lambda *args, **kwargs: format_text(self, text, args, kwargs)
        return lambda mapping: format_text(self, text, (), mapping)


def render(template: Template, variables: Mapping[str, object]) -> str:
    """Return the text of a template.

    Raises:
        OverBudget: the template exceeds the budget of `bounded_rendering`.
        Cancelled: the client has disconnected.
    """
    budget = current()
    pieces, num_chars = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > budget.max_chars:
            raise PromptTooLong(f"would make a prompt of more than {budget.max_chars} characters")
    return "".join(pieces)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`: a separate scope that shows its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: object) -> None:
        # not a named parameter, so that templates can use the name `self`
        self, *rest = args
        values = _Dict()(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __repr__(self) -> str:
        # counted at each place that shows it
        return f"<Namespace {to_text(self._Namespace__attrs)}>"

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict` without the methods of the type, which could change the caller's messages."""

    def __call__(self, /, *args: Any, **kwargs: object) -> dict[Any, Any]:
        for value in args[:1]:
            if not isinstance(value, Mapping):
                args = (make_dict((key, entry) for key, entry in value), *args[1:])
        result = dict(*args, **kwargs)
        current().spend(getsizeof(result))
        return result

    def fromkeys(self, keys: Iterable[object], value: object = None) -> dict[Any, Any]:
        """Return a dict with these keys and one value for all."""
        return from_keys(keys, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace: got the name {name!r}; must not begin with an underscore")


def _raise_exception(message: str) -> None:
    raise TemplateError(to_text(message))


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_TIME_FORMAT:
        raise OverBudget(f"strftime_now takes at most {_MAX_TIME_FORMAT} characters")
    return datetime.now().strftime(format)
