"""Encodings of conversations for DeepSeek models whose folders have no template.

These models are trained on fixed texts, such as the one that offers tools. The texts are literals
in a Python file of the model's folder, `encoding/encoding_dsv32.py` or `encoding/encoding_dsv4.py`.
The file is parsed for those literals and never run. A copy of a model without the file gets our
wording of the same format, `deepseek_v32_tools.txt` or `deepseek_v4_tools.txt`.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd_dsa.chat.parser import THINK_BEGIN, THINK_END
from fd_dsa.chat.template import MAX_TEMPLATE_BYTES, SWITCHES, ChatTemplate
from fd_dsa.chat.tool_formats import DSML
from fd_dsa.command_line.inputs import read_bounded

V32_FILE = Path("encoding", "encoding_dsv32.py")
V4_FILE = Path("encoding", "encoding_dsv4.py")
_OWN = Path(__file__).parent
_SCHEMAS, _SCHEMA = "{tool_schemas}", "{schema}"
# levels of `reasoning_effort` -> the levels that DeepSeek-V4 is trained on, as in vLLM
_V4_EFFORTS = {
    "none": "none",
    "minimal": "low",
    "low": "low",
    "medium": "low",
    "high": "high",
    "xhigh": "high",
    "max": "max",
}

logger = logging.getLogger(__name__)


class DeepseekV32Encoding(ChatTemplate):
    """Renders conversations in the format of DeepSeek-V3.2's training.

    Args:
        instructions: text that offers tools. `{tool_schemas}` is replaced by their schemas.
    """

    def __init__(self, instructions: str) -> None:
        super().__init__(
            _own_source("deepseek_v32.jinja"),
            {"instructions": instructions},
            "DeepSeek-V3.2's own encoding",
            ("deepseek_v32",),
        )

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """See `ChatTemplate`. The only further variable is the switch of the reasoning.

        `reasoning_effort` is accepted without effect, because the model has no levels.

        Raises:
            ValueError: the model does not support this order of roles, or the variable.
        """
        others = kwargs.keys() - {"tools", "continue_final_message", "reasoning_effort"}
        _check_variables("DeepSeek-V3.2", {name: kwargs[name] for name in others}, SWITCHES)
        begins = add_generation_prompt and not kwargs.get("continue_final_message")
        return super().render(messages, begins, **kwargs)


@dataclass(frozen=True)
class V4Words:
    """Texts in the prompts of DeepSeek-V4.

    Attributes:
        tools: offers tools. Contains `{tool_schemas}`.
        response_format: asks for a form of the answer. Contains `{schema}`.
        efforts: level of the effort -> text before the conversation. Other levels have no text.
    """

    tools: str
    response_format: str
    efforts: Mapping[str, str]


_OWN_FORM = f"The answer must be JSON of this schema:\n{_SCHEMA}"
_OWN_EFFORTS = {
    "high": "Think thoroughly, and check each step before you answer.\n\n",
    "max": "Think as long as it helps. Check each step, try other ways, and test the result.\n\n",
}


class DeepseekV4Encoding(ChatTemplate):
    """Renders conversations in the format of DeepSeek-V4's training.

    The model reasons unless the switch is off or `reasoning_effort` is "none".
    """

    def __init__(self, words: V4Words) -> None:
        super().__init__(
            _own_source("deepseek_v4.jinja"),
            {"offer": words.tools, "form": words.response_format},
            "DeepSeek-V4's own encoding",
            ("deepseek_v4",),
        )
        self._efforts = words.efforts

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        continue_final_message: bool = False,
        reasoning_effort: object = None,
        **kwargs: object,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: OpenAI's roles, `developer` (a user's message that offers tools), and
                `latest_reminder` (a note). A message may have `tools`, `response_format`, the name
                of the model's next `task`, and `wo_eos`.
            reasoning_effort: a level of OpenAI's API or "max". None is the same as "low".
            kwargs: the switch of the reasoning, and `drop_thinking`. False keeps the reasoning
                before the last message of the user. A prompt with tools always keeps it.

        Raises:
            ValueError: the model does not support the role, the task or the variable.
        """
        _check_variables("DeepSeek-V4", kwargs, (*SWITCHES, "drop_thinking"))
        effort = "low" if reasoning_effort is None else _V4_EFFORTS.get(str(reasoning_effort))
        if effort is None:
            raise ValueError(
                f"chat_template_kwargs: reasoning_effort is {reasoning_effort!r}; it must be one "
                f"of {', '.join(_V4_EFFORTS)}"
            )
        switches = [kwargs[name] for name in SWITCHES if kwargs.get(name) is not None]
        thinks = switches[0] if switches else effort != "none"
        turns = _with_tools(_turns(messages), tools or ())
        drops = kwargs.get("drop_thinking") is not False and not any(t.get("tools") for t in turns)
        if thinks and drops:
            turns = _without_old_developers(turns)
        return super().render(
            turns,
            add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            thinks=thinks,
            drops=drops,
            effort=self._efforts.get(effort, ""),
            last_user=_last_user(turns),
        )


_Block = tuple[str, str | None]
"""A text in a message of the user.

The second entry is the call's id if it is a result.
"""


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert contents to text, and merge results of tools into the user's messages.

    Adjacent messages of the user and of tools become one message of the user. Results are sorted in
    the order of their calls.
    """
    turns: list[dict[str, Any]] = []
    # (turn of the user, its texts, order of the calls before it)
    users: list[tuple[dict[str, Any], list[_Block], Mapping[str, int]]] = []
    order: dict[str, int] = {}
    for message in messages:
        role, text = message.get("role"), _text(message.get("content"))
        if role not in ("user", "tool"):
            turns.append({**message, "content": text})
            if message.get("tool_calls"):
                calls = enumerate(message["tool_calls"])
                order = {call["id"]: index for index, call in calls if call.get("id")}
            continue
        goes_on = bool(turns) and turns[-1].get("role") == "user"
        if not goes_on or (role == "user" and turns[-1].get("task") is not None):
            turns.append(dict(message) if role == "user" else {"role": "user"})
            users.append((turns[-1], [], order))
        call = message.get("tool_call_id") or "" if role == "tool" else None
        users[-1][1].append((text if call is None else f"<tool_result>{text}</tool_result>", call))
    for turn, blocks, calls_before in users:
        turn["content"] = _joined(blocks, calls_before)
    return turns


def _joined(blocks: Sequence[_Block], order: Mapping[str, int]) -> str:
    """Return the text of a user's message.

    Args:
        order: id of a call -> its position among the latest calls.
    """
    # a result of an unknown call sorts like the first call
    results = [(order.get(call, 0), text) for text, call in blocks if call is not None]
    results.sort(key=lambda result: result[0])
    ordered = iter(results)
    return "\n\n".join(text if call is None else next(ordered)[1] for text, call in blocks)


def _text(content: Any) -> str:
    """Return the text of a content: a string, a list of text parts, or missing."""
    if not isinstance(content, list):
        return content or ""
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"content: got a part of type {kind!r}; DeepSeek-V4 reads text only")
        texts.append(part.get("text") or "")
    return "\n\n".join(texts)


def _with_tools(
    turns: list[dict[str, Any]], tools: Sequence[Mapping[str, object]]
) -> list[dict[str, Any]]:
    """Offer tools in the first system message, which is added if necessary."""
    if not tools:
        return turns
    system = next((turn for turn in turns if turn.get("role") == "system"), None)
    if system is None:
        return [{"role": "system", "content": "", "tools": tools}, *turns]
    system["tools"] = tools
    return turns


def _without_old_developers(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Remove developer messages before the last user's or developer's message."""
    last = _last_user(turns)
    return [t for index, t in enumerate(turns) if t.get("role") != "developer" or index >= last]


def _last_user(turns: Sequence[Mapping[str, object]]) -> int:
    """Return the index of the last message of a user or developer, -1 without one."""
    users = [index for index, t in enumerate(turns) if t.get("role") in ("user", "developer")]
    return users[-1] if users else -1


def _check_variables(model: str, variables: Mapping[str, object], known: Collection[str]) -> None:
    """Raise ValueError for a variable that is not a known switch, or not true or false."""
    for name, value in variables.items():
        if name not in known:
            raise ValueError(
                f"chat_template_kwargs: has {name!r}; {model}'s encoding knows "
                f"{' and '.join(known)}"
            )
        if not isinstance(value, bool | None):
            raise ValueError(f"chat_template_kwargs: {name} is {value!r}; it must be true or false")
    if {True, False} <= {variables.get(name) for name in SWITCHES}:
        raise ValueError(
            "chat_template_kwargs: thinking and enable_thinking differ; they are two names of "
            "one switch"
        )


def _own_source(name: str) -> str:
    """Return the source of one of our templates, after the shared one for tool calls."""
    return "".join((_OWN / file).read_text("utf-8") for file in ("deepseek_dsml.jinja", name))


def read_instructions(folder: Path) -> str:
    """Return the text that offers tools to V3.2, from the folder or ours.

    It contains `{tool_schemas}`.
    """
    name = "TOOLS_SYSTEM_TEMPLATE"
    text = _text_with(_SCHEMAS, _literals(folder / V32_FILE).get(name))
    if text is None:
        _warn_of_own_words(folder, V32_FILE, [name])
        text = (_OWN / "deepseek_v32_tools.txt").read_text("utf-8")
    return _with_marks(text)


def read_v4_words(folder: Path) -> V4Words:
    """Return the folder's texts for V4. Missing texts are replaced by ours.

    The first release has a text for the highest effort only. Later ones have a table of levels.
    """
    found = _literals(folder / V4_FILE)
    efforts = found.get("REASONING_EFFORT_PROMPTS", {"max": found.get("REASONING_EFFORT_MAX")})
    if not isinstance(efforts, dict) or not all(
        isinstance(text, str) for level in efforts.items() for text in level
    ):
        efforts = None
    texts: dict[str, Any] = {
        "TOOLS_TEMPLATE": _text_with(_SCHEMAS, found.get("TOOLS_TEMPLATE")),
        "response_format_template": _text_with(_SCHEMA, found.get("response_format_template")),
        "REASONING_EFFORT_PROMPTS": efforts,
    }
    missing = [name for name, text in texts.items() if text is None]
    if missing:
        _warn_of_own_words(folder, V4_FILE, missing)
    tools, form, _ = texts.values()
    return V4Words(
        _with_marks(tools or (_OWN / "deepseek_v4_tools.txt").read_text("utf-8")),
        form or _OWN_FORM,
        _OWN_EFFORTS if efforts is None else efforts,
    )


def _text_with(place: str, value: object) -> str | None:
    """Return the value if it is a text with the placeholder, otherwise None."""
    return value if isinstance(value, str) and place in value else None


def _with_marks(text: str) -> str:
    """Fill the markers into a text that offers tools."""
    marks = {"dsml": DSML, "thinking_start": THINK_BEGIN, "thinking_end": THINK_END}
    for name, mark in marks.items():
        text = text.replace(f"{{{name}_token}}", mark)
    return text


def _warn_of_own_words(folder: Path, file: Path, names: Sequence[str]) -> None:
    logger.warning(
        "chat: %s of %s has no %s; prompts have other words than those that the model was trained "
        "on",
        file,
        folder,
        ", ".join(names),
    )


def _literals(file: Path) -> dict[str, Any]:
    """Return the literals that a Python file assigns to names, empty if unreadable."""
    try:
        tree = ast.parse(read_bounded(file, MAX_TEMPLATE_BYTES).decode("utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return {}
    literals = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        try:
            value = ast.literal_eval(node.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        literals.update({target.id: value for target in targets if isinstance(target, ast.Name)})
    return literals
