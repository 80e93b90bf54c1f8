"""Prompts of conversations: Jinja in a sandbox, with the names that templates expect."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fd_dsa.chat.parser import Arguments, is_reasoning_only
from fd_dsa.errors import ConfigError

# variables of a template which are not a caller's to set
RESERVED = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "self",
)
# two names of one variable
SWITCHES = ("thinking", "enable_thinking")
_BEYOND_PYTHON: dict[type[Exception], str] = {
    RecursionError: "nests too deeply",
    MemoryError: "makes more than there is memory for",
}
# marks where a final message goes on; no text of a conversation holds it
_CUT = "\ue000\ue001cut\ue001\ue000"
# what one multiplication or power may make
_MOST_ENTRIES, _MOST_BITS = 1 << 20, 1 << 12


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no product or power makes a giant text, list or number."""

    # what is intercepted is not computed while a template is compiled
    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        counts = [value for value in (left, right) if isinstance(value, int)]
        texts = [value for value in (left, right) if isinstance(value, str | bytes | list | tuple)]
        if texts and counts and len(texts[0]) * counts[0] > _MOST_ENTRIES:
            raise SecurityError(
                f"'*' would make a text or list of more than {_MOST_ENTRIES} entries"
            )
        if len(counts) == 2:
            bits = left.bit_length()
            bits = bits + right.bit_length() if operator == "*" else bits * right
            if bits > _MOST_BITS:
                raise SecurityError(
                    f"{operator!r} would make a number of more than {_MOST_BITS} bits"
                )
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled chat template.

    Args:
        special_tokens: variables such as bos_token which the template may use.
        model_type: of the model's config.json; with the source it decides how answers are read.

    Raises:
        ConfigError: the template does not compile; names the origin.

    Source: the environment is that of Hugging Face's chat templates, so that the templates of
    model folders render alike.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        origin: str = "the request",
        model_type: str | None = None,
    ) -> None:
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        # placeholder text of any length
        del environment.globals["lipsum"]
        # unlike Jinja's own filter without HTML escapes
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"chat template of {origin}: line {error.lineno} is no valid Jinja: {error.message}"
            ) from error
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            # of the Python code that Jinja makes: blocks or numbers beyond what Python takes
            why = _BEYOND_PYTHON.get(type(error), f"does not compile: {error}")
            raise ConfigError(f"chat template of {origin}: {why}") from error
        self.source = source
        self.origin = origin
        self.model_type = model_type
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Text of a conversation.

        Args:
            kwargs: further variables. `thinking` and `enable_thinking` are two names of one: a
                template that knows either gets it.

        Raises:
            ValueError: the template refuses the messages, or fails on them; the last message
                cannot be continued.
        """
        thinking = [kwargs[name] for name in SWITCHES if kwargs.get(name) is not None]
        prepared = [_for_template(message) for message in messages]
        if continue_final_message:
            prepared[-1] = _with_cut(prepared[-1])
        variables = {
            **self._special_tokens,
            "documents": None,
            **({name: thinking[-1] for name in SWITCHES} if thinking else {}),
            **kwargs,
            "tools": list(tools) if tools else None,
            "messages": prepared,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(**variables)
        except Exception as error:
            why = _BEYOND_PYTHON.get(type(error), str(error))
            raise ValueError(f"chat template: {why}") from error
        if not continue_final_message:
            return text
        head, cut, _ = text.rpartition(_CUT)
        if not cut:
            raise ValueError("chat template: does not show the last message, so nothing goes on")
        return head


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose arguments serve templates that want JSON text and those that want a dict."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = Arguments.read(function["arguments"])
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls} if calls else dict(message)


def _with_cut(message: dict[str, Any]) -> dict[str, Any]:
    """The last message, marked where it goes on: in its reasoning if it has nothing else."""
    if message.get("role") != "assistant":
        raise ValueError(
            f"the last message is of role {message.get('role')!r}; continue_final_message goes on "
            "with a message of role assistant"
        )
    if message.get("tool_calls"):
        raise ValueError("the last message ends with tool calls, so its text cannot go on")
    name = "reasoning_content" if is_reasoning_only(message) else "content"
    return {**message, name: f"{message.get(name) or ''}{_CUT}"}


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
