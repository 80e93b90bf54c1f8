"""What makes prompts of conversations: Jinja in a sandbox, with the names that templates expect.

Folders of DeepSeek-V3.2 have no template: theirs is `deepseek_v32.jinja`. The model was trained on
one text that offers tools. It is in `encoding/encoding_dsv32.py` of its folder, from where it is
read as the literal that it is; nothing of the file is run. Copies of the model without the file get
our words for the same format, `deepseek_v32_tools.txt`.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateSyntaxError

from fd_dsa.chat.parser import THINK_BEGIN, THINK_END, is_reasoning_only, read_arguments
from fd_dsa.chat.sandbox import Sandbox
from fd_dsa.chat.tool_formats import DSML
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
_SWITCHES = ("thinking", "enable_thinking")
_V32_TURNS = ("<｜User｜>", "<｜Assistant｜>")
_BEYOND_PYTHON: dict[type[Exception], str] = {
    RecursionError: "nests too deeply",
    MemoryError: "makes more than there is memory for",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning of a message; the first one in use counts."""
# marks where a final message goes on; no text of a conversation holds it
_CUT = "\ue000\ue001cut\ue001\ue000"
# texts that the prompt of a template either shows or not
_FIRST, _LAST, _KEY = "first7c1e", "last7c1e", "key7c1e"

logger = logging.getLogger(__name__)


class ChatTemplate:
    """A compiled chat template.

    Args:
        special_tokens: variables such as bos_token which the template may use.

    Raises:
        ConfigError: the template does not compile; names the origin.

    Source: the environment is that of Hugging Face's chat templates, so that the templates of
    model folders render alike.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], origin: str = "the request"
    ) -> None:
        try:
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
            ValueError: the template refuses the messages, or fails on them; the last message
                cannot be continued.
        """
        thinking = [kwargs[name] for name in _SWITCHES if kwargs.get(name) is not None]
        prepared = [self._prepare(message) for message in messages]
        if continue_final_message:
            prepared[-1] = _with_cut(prepared[-1])
        variables = {
            **self._special_tokens,
            "documents": None,
            **({name: thinking[-1] for name in _SWITCHES} if thinking else {}),
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

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message in the forms that templates expect."""
        prepared = {**message, **_reasoning(message)}
        if message.get("tool_calls"):
            prepared["tool_calls"] = [_call(call) for call in message["tool_calls"]]
        else:
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
        variables = {**self._special_tokens, "documents": None, "tools": None}
        try:
            text = self._template.render(
                **variables, messages=_probe(role, content), add_generation_prompt=True
            )
        except Exception:
            # a template may refuse the example for any reason
            return False
        _, first, rest = text.partition(_FIRST)
        return bool(first) and _LAST in rest and _KEY not in text


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
        *before, last = text
        return {**message, "content": [*before, {**last, "text": last["text"] + _CUT}]}
    return {**message, **dict.fromkeys(names, text + _CUT)}


ENCODING_FILE = Path("encoding", "encoding_dsv32.py")
_INSTRUCTIONS = "TOOLS_SYSTEM_TEMPLATE"
_OWN = Path(__file__).with_name("deepseek_v32.jinja")


class DeepseekV32Encoding(ChatTemplate):
    """Renders conversations as DeepSeek-V3.2 was trained on them.

    Args:
        instructions: text that offers tools, `{tool_schemas}` where their schemas go.
    """

    def __init__(self, instructions: str) -> None:
        variables = {"instructions": instructions}
        super().__init__(_OWN.read_text("utf-8"), variables, "DeepSeek-V3.2's own encoding")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """See `ChatTemplate`; of further variables it knows the switch of the reasoning alone.

        `reasoning_effort` is taken and changes nothing: the model reasons or does not.

        Raises:
            ValueError: the model does not know this order of roles, or the variable.
        """
        for name in kwargs.keys() - {"tools", "continue_final_message", "reasoning_effort"}:
            if name not in _SWITCHES:
                raise ValueError(
                    f"chat_template_kwargs: has {name!r}; DeepSeek-V3.2's encoding knows "
                    f"{' and '.join(_SWITCHES)}"
                )
            if not isinstance(kwargs[name], bool | None):
                raise ValueError(
                    f"chat_template_kwargs: {name} is {kwargs[name]!r}; it must be true or false"
                )
        if {True, False} <= {kwargs.get(name) for name in _SWITCHES}:
            raise ValueError(
                "chat_template_kwargs: thinking and enable_thinking differ; they are two names of "
                "one switch"
            )
        begins = add_generation_prompt and not kwargs.get("continue_final_message")
        return super().render(messages, begins, **kwargs)


def read_instructions(folder: Path) -> str:
    """The folder's own text that offers tools, or ours; `{tool_schemas}` is still in it."""
    text = _literal(folder / ENCODING_FILE)
    if "{tool_schemas}" not in text:
        logger.warning(
            "chat: %s of %s has no %s; tools are offered in other words than those that the model "
            "was trained on",
            ENCODING_FILE,
            folder,
            _INSTRUCTIONS,
        )
        text = _OWN.with_name("deepseek_v32_tools.txt").read_text("utf-8")
    marks = {"dsml": DSML, "thinking_start": THINK_BEGIN, "thinking_end": THINK_END}
    for name, mark in marks.items():
        text = text.replace(f"{{{name}_token}}", mark)
    return text


def _literal(file: Path) -> str:
    """The string that a Python file assigns to the text's name; empty where there is none."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ""
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        is_named = any(isinstance(t, ast.Name) and t.id == _INSTRUCTIONS for t in targets)
        if is_named and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return node.value.value
    return ""


def read_renderer(
    folder: Path,
    tokenizer_config: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    model_type: str | None,
    has_token: Callable[[str], bool],
    template_file: Path | None = None,
) -> ChatTemplate | None:
    """What renders the conversations of a model folder, None where nothing does.

    `template_file` takes precedence, then the folder's chat_template.jinja, then `chat_template`
    of its tokenizer_config.json; of a list of named templates the one named "default" counts. A
    folder of DeepSeek-V3.2 without any has the model's own encoding.

    Raises:
        ConfigError: a template cannot be read or compiled, or is of another type; names the file.
    """
    file = template_file or folder / "chat_template.jinja"
    origin = file.name if template_file is None else f"--chat-template {file.name}"
    if template_file is not None or file.is_file():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens, origin)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat template of {origin}: cannot be read: {error}") from error
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list) and all(isinstance(entry, dict) for entry in source):
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise ConfigError(
            f"chat template: chat_template of {folder / 'tokenizer_config.json'} is a "
            f"{type(source).__name__}; it must be a string or a list of named templates"
        )
    if source is not None:
        return ChatTemplate(source, special_tokens, "tokenizer_config.json")
    if model_type == "deepseek_v32" and all(map(has_token, _V32_TURNS)):
        return DeepseekV32Encoding(read_instructions(folder))
    return None
