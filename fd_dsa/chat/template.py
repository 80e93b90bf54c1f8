"""Chat templates, compiled and rendered by Jinja in a sandbox, and the formats of their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jinja2.exceptions import TemplateSyntaxError

from fd_dsa.cancellation import Cancelled
from fd_dsa.chat.parser import (
    AUTO,
    NONE,
    THINK_BEGIN,
    THINK_END,
    TOOL_FORMATS,
    read_arguments,
    split_reasoning,
)
from fd_dsa.chat.sandbox import (
    OverBudget,
    PromptTooLong,
    Renderer,
    bounded_rendering,
    compile_template,
)
from fd_dsa.chat.tool_formats import DSML, GLM_KEY, V31_CALLS, ToolFormat
from fd_dsa.errors import ConfigError

Role = Literal["system", "developer", "user", "assistant", "tool"]
"""Role of a message of a chat completion."""
# variables of a template that callers must not set
RESERVED = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "allow_special_tokens_in_text",
    "self",
)
# two names of the same variable
SWITCHES = ("thinking", "enable_thinking")
_BEYOND_PYTHON: dict[type[Exception], str] = {
    RecursionError: "nests too deeply",
    MemoryError: "makes more than there is memory for",
}
# the compiler takes about a second for 20,000 characters
_MAX_SOURCE_CHARS = 1 << 16
MAX_TEMPLATE_BYTES = 4 * _MAX_SOURCE_CHARS
"""Maximum size of a template's file, whose characters have up to four bytes in UTF-8."""
# a template may quote a text of any length in its errors
_MAX_REASON_CHARS = 1000
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning field of a message. The first one in use counts."""
# tool format -> its sign in the source of a template; the first match counts
_SIGNS = {
    "deepseek_v32": DSML,
    "deepseek_v4": DSML,
    "deepseek_v31": V31_CALLS,
    "glm47": GLM_KEY,
}
# marks the place where a final message continues; no text of a conversation contains it
_CUT = "\ue000\ue001cut\ue001\ue000"
# texts of an example message, searched in its prompt
_FIRST, _LAST, _KEY = "first7c1e", "last7c1e", "key7c1e"


class ChatTemplate:
    """A compiled chat template.

    Args:
        special_tokens: variables for the template, such as bos_token.
        family_formats: tool-call formats of the model's family, newest first. They precede the
            others, and decide between formats with the same sign in the source.
        compiler: makes the renderer of the source. The default renders in this process, without a
            limit of memory.

    Raises:
        ConfigError: the template does not compile. The message names the origin.

    Source: the environment of Hugging Face's chat templates, so that the templates of model folders
    render in the same way.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        origin: str = "the request",
        family_formats: Sequence[str] = (),
        compiler: Callable[[str], Renderer] = compile_template,
    ) -> None:
        if len(source) > _MAX_SOURCE_CHARS:
            raise ConfigError(
                f"chat template of {origin}: has {len(source)} characters; it must have at most "
                f"{_MAX_SOURCE_CHARS}"
            )
        try:
            self._render = compiler(source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"chat template of {origin}: line {error.lineno} is no valid Jinja: {error.message}"
            ) from error
        except Cancelled:
            raise
        except Exception as error:
            # Jinja generates Python code, which may exceed Python's limits for blocks or numbers
            why = _BEYOND_PYTHON.get(type(error), f"does not compile: {error}")
            raise ConfigError(f"chat template of {origin}: {why}") from error
        self.source = source
        self.origin = origin
        self.family_formats = tuple(family_formats)
        self._special_tokens = dict(special_tokens)
        # by role, filled when the first message of a role is rendered
        self._shown: dict[str, tuple[bool, bool]] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        continue_final_message: bool = False,
        **kwargs: object,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: `content` is a string or a list of text parts, and is converted to the form
                that the template shows. A list may become one string of several lines, and a string
                may become a list with one part.
            kwargs: further variables. `thinking` and `enable_thinking` are two names of one switch,
                and a template gets both.

        Raises:
            ValueError: the template refuses the messages, fails, or exceeds the budget of
                `bounded_rendering`. Or the last message cannot be continued.
            Cancelled: the client has disconnected.
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
            raise ValueError("chat template: omits the last message, so it cannot be continued")
        return head

    def tool_format_name(self, name: str = AUTO) -> str:
        """Return the name of the format of tool calls, or `NONE`.

        Args:
            name: one of `TOOL_FORMATS`, `NONE`, or `AUTO` for the format of the template.
        """
        if name != AUTO:
            return name
        order = (*self.family_formats, *_SIGNS)
        found = next((one for one in order if _SIGNS[one] in self.source), NONE)
        # two generations share the sign, but only V3.2 has a section of this name
        is_unsure = found == "deepseek_v32" and found not in self.family_formats
        return "deepseek_v4" if is_unsure and "function_calls" not in self.source else found

    def tool_format(self, name: str = AUTO) -> ToolFormat | None:
        """Return the format with the name of `tool_format_name`, or None for `NONE`."""
        return TOOL_FORMATS.get(self.tool_format_name(name))

    def reasoning_format_name(self, name: str = AUTO) -> str:
        """Return the name of the form of reasoning, or `NONE`.

        Args:
            name: one of `REASONING_FORMATS`, `NONE`, or `AUTO` for the form of the template.
        """
        if name != AUTO:
            return name
        if THINK_END not in self.source:
            return NONE
        calls = self.tool_format_name()
        return {"glm47": "glm45", "deepseek_v4": "deepseek_v4"}.get(calls, "deepseek_v3")

    def has_reasoning(self, name: str = AUTO) -> bool:
        """Return True if <think>...</think> at the beginning of an answer is reasoning."""
        return self.reasoning_format_name(name) != NONE

    def _rendered(self, variables: Mapping[str, object]) -> str:
        try:
            return self._render(variables)
        except Cancelled:
            raise
        except OverBudget as error:
            raise type(error)(f"chat template: {error}") from error
        except Exception as error:
            why = _BEYOND_PYTHON.get(type(error), str(error)[:_MAX_REASON_CHARS])
            raise ValueError(f"chat template: {why}") from error

    def _prepare(self, message: Mapping[str, object]) -> dict[str, Any]:
        """Convert a message to the forms that templates expect."""
        prepared = {**with_read_arguments(message), **_reasoning(message)}
        if not prepared.get("tool_calls"):
            # templates test whether the name exists, and clients send an empty list or null
            prepared.pop("tool_calls", None)
        role, content = str(message.get("role")), message.get("content")
        texts = _texts(content)
        if texts is not None and not self._shows(role)[1]:
            prepared["content"] = "\n".join(texts)
        elif isinstance(content, str) and self._shows(role) == (False, True):
            prepared["content"] = [{"type": "text", "text": content}]
        return prepared

    def _shows(self, role: str) -> tuple[bool, bool]:
        """Determine the content that the prompt shows for a role: a string, a list of parts.

        Rendering an example decides. The template's code is a weaker sign, because it may pass the
        content to a macro and treat each role differently.
        """
        shown = self._shown.get(role)
        if shown is None:
            part = {"type": "text", "text": _FIRST, _KEY: _KEY}
            parts = [part, {**part, "text": _LAST}]
            is_text = self._is_shown(role, f"{_FIRST} {_LAST}")
            shown = self._shown[role] = is_text, self._is_shown(role, parts)
        return shown

    def _is_shown(self, role: str, content: object) -> bool:
        """Return True if a prompt shows both texts in order, without the markup of a list."""
        variables = {
            **self._special_tokens,
            "documents": None,
            "tools": None,
            "messages": _probe(role, content),
            "add_generation_prompt": True,
        }
        try:
            text = self._rendered(variables)
        except ValueError as error:
            if isinstance(error, OverBudget) and not isinstance(error, PromptTooLong):
                # a killed process does not tell its time, so another one could use as much
                raise
            # a template may refuse the example for any reason
            return False
        _, first, rest = text.partition(_FIRST)
        return bool(first) and _LAST in rest and _KEY not in text


def opens_reasoning(prompt: str, continued: Mapping[str, object] | None) -> bool:
    """Return True if an answer begins inside the reasoning.

    Args:
        prompt: text of the prompt.
        continued: the last message if the answer continues it.
    """
    if continued is not None and _is_inside_reasoning(continued):
        return prompt.rfind(THINK_BEGIN) > prompt.rfind(THINK_END)
    return prompt.rstrip().endswith(THINK_BEGIN)


def _is_inside_reasoning(message: Mapping[str, object]) -> bool:
    """Return True if a message of the assistant ends inside its reasoning, in either field."""
    is_begun = len(split_reasoning(message.get("content"))) == 2 and not message.get("tool_calls")
    return _is_reasoning_only(message) or is_begun


def _is_reasoning_only(message: Mapping[str, object]) -> bool:
    """Return True if a message of the assistant has reasoning and no further part."""
    return bool(message.get("reasoning_content")) and not (
        message.get("content") or message.get("tool_calls")
    )


def with_read_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with `Arguments` in its calls."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call(call) for call in calls]} if calls else dict(message)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call of the history with arguments for both kinds of templates."""
    function = call["function"]
    arguments = read_arguments(function.get("arguments"))
    return {**call, "function": {**function, "arguments": arguments}}


def _texts(content: object) -> list[str] | None:
    """Return the texts of a list of text parts, or None for other content."""
    if not isinstance(content, list):
        return None
    texts = [
        part["text"]
        for part in content
        if isinstance(part, Mapping) and isinstance(part.get("text"), str)
    ]
    return texts if len(texts) == len(content) else None


def _reasoning(message: Mapping[str, object]) -> dict[str, Any]:
    """Return the reasoning of a message under each name that templates use."""
    for name in REASONING:
        if message.get(name) is not None:
            return dict.fromkeys(REASONING, message[name])
    return {}


def _probe(role: str, content: object) -> list[dict[str, Any]]:
    """Return a conversation with this content, in an order that all templates accept."""
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
    """Mark the place where the last message continues: in its content or its reasoning."""
    if message.get("role") != "assistant":
        raise ValueError(
            f"the last message is of role {message.get('role')!r}; continue_final_message "
            "continues a message of role assistant"
        )
    if message.get("tool_calls"):
        raise ValueError("the last message ends with tool calls, so its text cannot be continued")
    names = REASONING if _is_reasoning_only(message) else ("content",)
    text = message.get(names[0]) or ""
    if isinstance(text, list):
        if _texts(text) is None:
            raise ValueError("the last message has parts without text, so it cannot be continued")
        *before, last = text
        return {**message, "content": [*before, {**last, "text": last["text"] + _CUT}]}
    return {**message, **dict.fromkeys(names, text + _CUT)}
