"""Prompts of conversations: Jinja in a sandbox, with the names that templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jinja2.exceptions import TemplateSyntaxError

from fd_dsa.cancellation import Cancelled
from fd_dsa.chat.budget import OverBudget, bounded_compilation, bounded_rendering
from fd_dsa.chat.parser import is_reasoning_only, read_arguments
from fd_dsa.chat.sandbox import Sandbox, render
from fd_dsa.errors import ConfigError

Role = Literal["system", "developer", "user", "assistant", "tool"]
"""Role of a message of a chat completion."""
# variables of a template which are not a caller's to set
RESERVED = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "allow_special_tokens_in_text",
    "self",
)
# two names of one variable
SWITCHES = ("thinking", "enable_thinking")
_BEYOND_PYTHON: dict[type[Exception], str] = {
    RecursionError: "nests too deeply",
    MemoryError: "makes more than there is memory for",
}
# the compiler needs a second for 20,000 characters or so
_MAX_SOURCE_CHARS = 1 << 16
# a template may quote a text of any length in its errors
_MAX_REASON_CHARS = 1000
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning of a message; the first one in use counts."""
# marks where a final message goes on; no text of a conversation holds it
_CUT = "\ue000\ue001cut\ue001\ue000"
# texts that the prompt of a template either shows or not
_FIRST, _LAST, _KEY = "first7c1e", "last7c1e", "key7c1e"


class ChatTemplate:
    """A compiled chat template.

    Args:
        special_tokens: variables such as bos_token which the template may use.
        family_formats: tool-call formats of the model's family, newest first. With the source they
            decide how answers are read.

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
        family_formats: Sequence[str] = (),
    ) -> None:
        if len(source) > _MAX_SOURCE_CHARS:
            raise ConfigError(
                f"chat template of {origin}: has {len(source)} characters; it must have at most "
                f"{_MAX_SOURCE_CHARS}"
            )
        try:
            with bounded_compilation():
                self._template = Sandbox().from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"chat template of {origin}: line {error.lineno} is no valid Jinja: {error.message}"
            ) from error
        except Exception as error:
            # Jinja makes Python code, whose blocks or numbers may be beyond Python's limits
            why = _BEYOND_PYTHON.get(type(error), f"does not compile: {error}")
            raise ConfigError(f"chat template of {origin}: {why}") from error
        self.source = source
        self.origin = origin
        self.family_formats = tuple(family_formats)
        self._special_tokens = dict(special_tokens)
        # by role; filled when the first message of a role is rendered
        self._shown: dict[str, tuple[bool, bool]] = {}

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
            messages: `content` is a text or a list of text parts. The template gets the form that
                it shows: parts that it does not show become one text of as many lines, and a text
                that it shows only inside of a part becomes one.
            kwargs: further variables. `thinking` and `enable_thinking` are two names of one: a
                template that knows either gets it.

        Raises:
            ValueError: the template refuses the messages, or fails on them, or makes more than
                `bounded_rendering` allows; the last message cannot be continued.
            Cancelled: the client has left.
        """
        thinking = [kwargs[name] for name in SWITCHES if kwargs.get(name) is not None]
        with bounded_rendering():
            prepared = [self._prepare(message) for message in messages]
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
            text = self._rendered(variables)
        if not continue_final_message:
            return text
        head, cut, _ = text.rpartition(_CUT)
        if not cut:
            raise ValueError("chat template: does not show the last message, so nothing goes on")
        return head

    def _rendered(self, variables: Mapping[str, Any]) -> str:
        try:
            return render(self._template, variables)
        except Cancelled:
            raise
        except OverBudget as error:
            raise type(error)(f"chat template: {error}") from error
        except Exception as error:
            why = _BEYOND_PYTHON.get(type(error), str(error)[:_MAX_REASON_CHARS])
            raise ValueError(f"chat template: {why}") from error

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message in the forms that templates expect."""
        prepared = {**with_read_arguments(message), **_reasoning(message)}
        if not prepared.get("tool_calls"):
            # templates ask whether the name exists, and clients send an empty list or null
            prepared.pop("tool_calls", None)
        role, content = str(message.get("role")), message.get("content")
        texts = _texts(content)
        if texts is not None and not self._shows(role)[1]:
            prepared["content"] = "\n".join(texts)
        elif isinstance(content, str) and self._shows(role) == (False, True):
            prepared["content"] = [{"type": "text", "text": content}]
        return prepared

    def _shows(self, role: str) -> tuple[bool, bool]:
        """Find out which content of a role the prompt shows: a text, and a list of text parts.

        A rendered example decides. The template's code says less: it may hand the content to a
        macro, and treat each role differently.
        """
        shown = self._shown.get(role)
        if shown is None:
            part = {"type": "text", "text": _FIRST, _KEY: _KEY}
            parts = [part, {**part, "text": _LAST}]
            is_text = self._is_shown(role, f"{_FIRST} {_LAST}")
            shown = self._shown[role] = is_text, self._is_shown(role, parts)
        return shown

    def _is_shown(self, role: str, content: Any) -> bool:
        """True if a prompt has both texts in their order, without the markup of a list."""
        variables = {
            **self._special_tokens,
            "documents": None,
            "tools": None,
            "messages": _probe(role, content),
            "add_generation_prompt": True,
        }
        try:
            text = self._rendered(variables)
        except ValueError:
            # a template may refuse the example for any reason
            return False
        _, first, rest = text.partition(_FIRST)
        return bool(first) and _LAST in rest and _KEY not in text


def with_read_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with `Arguments` in its calls."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call(call) for call in calls]} if calls else dict(message)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of the history, with arguments for both kinds of templates."""
    function = call["function"]
    arguments = read_arguments(function.get("arguments"))
    return {**call, "function": {**function, "arguments": arguments}}


def _texts(content: Any) -> list[str] | None:
    """The texts of a list of text parts, None for any other content."""
    if not isinstance(content, list):
        return None
    texts = [
        part["text"]
        for part in content
        if isinstance(part, Mapping) and isinstance(part.get("text"), str)
    ]
    return texts if len(texts) == len(content) else None


def _reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The reasoning of a message under each name that templates know."""
    for name in REASONING:
        if message.get(name) is not None:
            return dict.fromkeys(REASONING, message[name])
    return {}


def _probe(role: str, content: Any) -> list[dict[str, Any]]:
    """A conversation with this content in a message of this role, which all templates take."""
    message = {"role": role, "content": content}
    hello = {"role": "user", "content": "Hi"}
    if role == "system":
        return [message, hello]
    if role == "assistant":
        return [hello, message, hello]
    if role == "tool":
        function = {"name": "f", "arguments": read_arguments("{}")}
        calls = [{"id": "call_0", "type": "function", "function": function}]
        calling = {"role": "assistant", "content": "", "tool_calls": calls}
        return [hello, calling, {**message, "tool_call_id": "call_0", "name": "f"}]
    return [message]


def _with_cut(message: dict[str, Any]) -> dict[str, Any]:
    """The last message, marked where it goes on: in its reasoning if it has nothing else."""
    if message.get("role") != "assistant":
        raise ValueError(
            f"the last message is of role {message.get('role')!r}; continue_final_message goes on "
            "with a message of role assistant"
        )
    if message.get("tool_calls"):
        raise ValueError("the last message ends with tool calls, so its text cannot go on")
    names = REASONING if is_reasoning_only(message) else ("content",)
    text = message.get(names[0]) or ""
    if isinstance(text, list):
        if _texts(text) is None:
            raise ValueError("the last message has other parts than texts, so nothing goes on")
        *before, last = text
        return {**message, "content": [*before, {**last, "text": last["text"] + _CUT}]}
    return {**message, **dict.fromkeys(names, text + _CUT)}
