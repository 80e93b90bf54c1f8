"""Jinja environment of chat templates: a sandbox with the expected names, and its budget.

Each loop, macro and piece of output of a template is a step. A step now and then checks the clock
and the client.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, missing, pass_context
from jinja2.visitor import NodeTransformer

from fd_dsa.cancellation import check_cancelled

DEFAULT_MAX_CHARS = 16 << 20
"""Maximum prompt length in characters if the caller sets no limit."""
MAX_SECONDS = 10.0
"""Maximum processor time of the renderings of one prompt, seconds."""
# a step takes about a microsecond
_CHECKED_STEPS = 16
_NAMES_OF_DICT = frozenset(dir(dict))
# a filter that no template can name with a bar
_STEP = "(step)"
Renderer = Callable[[Mapping[str, object]], str]
"""A compiled template: returns the text for its variables, within the budget of the thread."""


class OverBudget(SecurityError, ValueError):
    """A template would exceed a limit of its rendering."""


class PromptTooLong(OverBudget):
    """The prompt would exceed its maximum length."""


class Budget:
    """The remaining processor time of the renderings of one prompt, in one thread.

    Args:
        max_chars: maximum length of each prompt, characters.
        max_seconds: maximum processor time, seconds.
    """

    def __init__(self, max_chars: int, max_seconds: float) -> None:
        self.max_chars = max_chars
        self._max_seconds = max_seconds
        self._end = time.thread_time() + max_seconds
        self._num_steps = 0

    @property
    def left_s(self) -> float:
        """Remaining processor time, seconds."""
        return self._end - time.thread_time()

    def spend(self, seconds: float) -> None:
        """Count processor time of another process, and check the rest.

        Raises:
            OverBudget: the time is used up.
            Cancelled: the client has disconnected.
        """
        self._end -= seconds
        check_cancelled()
        if self.left_s <= 0:
            raise OverBudget(f"takes more than {self._max_seconds:g} s of processor time")

    def step(self) -> None:
        """Count a step, and check the time and the client now and then. See `spend`."""
        self._num_steps += 1
        if not self._num_steps % _CHECKED_STEPS:
            self.spend(0)


_active: ContextVar[Budget] = ContextVar("budget")
current = _active.get
"""The budget of the rendering that runs in this thread."""


@contextmanager
def bounded_rendering(
    max_chars: int | None = None, max_seconds: float | None = None
) -> Iterator[None]:
    """Render the templates inside with one budget.

    Args:
        max_chars: maximum length of each prompt, characters. None keeps the caller's budget, or
            uses `DEFAULT_MAX_CHARS` without one.
        max_seconds: maximum processor time, seconds. None = `MAX_SECONDS`.
    """
    if max_chars is None and _active.get(None) is not None:
        yield
        return
    chars = DEFAULT_MAX_CHARS if max_chars is None else max_chars
    token = _active.set(Budget(chars, MAX_SECONDS if max_seconds is None else max_seconds))
    try:
        yield
    finally:
        _active.reset(token)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of transformers, with a step of the budget in each loop and macro.

    Differences from Jinja's own sandbox: `tojson` does not escape HTML and has the arguments of
    `json.dumps`. `{% generation %}` marks text for training and shows its body. `{% break %}`, `{%
    continue %}`, `raise_exception` and `strftime_now` exist. Namespaces have no attribute that
    begins with an underscore. `dict` gives no access to the type.

    Source: `transformers.utils.chat_template_utils`, read for its names and arguments.
    """

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        self.filters.update({"tojson": to_json, _STEP: _step})
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            namespace=_Namespace,
            dict=_Dict(),
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _Stepping().visit(template)
        template.set_environment(self)
        return template

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


def compile_template(source: str) -> Renderer:
    """Compile a template of the operator, whose renderings run in this process."""
    return partial(render, Sandbox().from_string(source))


def render(template: Template, variables: Mapping[str, object]) -> str:
    """Return the text of a template.

    Raises:
        OverBudget: the template exceeds the budget of `bounded_rendering`.
        Cancelled: the client has disconnected.
    """
    budget = current()
    pieces, num_chars = [], 0
    for piece in template.generate(variables):
        budget.step()
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > budget.max_chars:
            raise PromptTooLong(f"would make a prompt of more than {budget.max_chars} characters")
    return "".join(pieces)


class _Stepping(NodeTransformer):
    """Begins the body of each loop, macro and block with a step."""

    def generic_visit(self, node: nodes.Node, *args: object, **kwargs: object) -> nodes.Node:
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
            nothing, line = nodes.Const(None), node.lineno
            step = nodes.Filter(nothing, _STEP, [], [], None, None, lineno=line)
            node.body.insert(0, nodes.ExprStmt(step, lineno=line))
        return node


@pass_context
def _step(context: object, value: object) -> None:
    # with the context, so that the compiler does not compute the step as a constant
    current().step()


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
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict` without the methods of the type, which could change the caller's messages."""

    def __call__(self, /, *args: Any, **kwargs: object) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[object], value: object = None) -> dict[Any, Any]:
        """Return a dict with these keys and one value for all."""
        return dict.fromkeys(keys, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace: got the name {name!r}; must not begin with an underscore")


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Filter `tojson`, with the arguments of transformers."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
