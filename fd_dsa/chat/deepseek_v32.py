"""DeepSeek-V3.2's own encoding of messages, for folders without a chat template.

Source of the format: `encoding/encoding_dsv32.py`, which comes with the model. A user's message
ends with the start of the answer: <think> where the model is to reason, </think> where not. Of
reasoning in the history only what follows the last message of the user is shown.

The model was trained on one text that offers tools. It is in that file, from where it is read as
the literal that it is; nothing of the file is run. Copies of the model that lack the file get our
words for the same format.
"""

from __future__ import annotations

import ast
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from fd_dsa.chat.parser import THINK_BEGIN, THINK_END, Arguments, is_reasoning_only
from fd_dsa.chat.tool_formats import (
    DSML,
    V32_ARGUMENT,
    V32_ARGUMENT_END,
    V32_CALL,
    V32_CALL_END,
    V32_CALLS,
    V32_CALLS_END,
)

ENCODING_FILE = Path("encoding", "encoding_dsv32.py")
_NAME = "TOOLS_SYSTEM_TEMPLATE"
_SCHEMAS = "{tool_schemas}"

OWN_INSTRUCTIONS = f"""## Tools

These tools can be called. A call is written as a block of this form, at the end of your message:

{V32_CALLS}
{V32_CALL} name="$TOOL">
{V32_ARGUMENT} name="$KEY" string="true|false">$VALUE{V32_ARGUMENT_END}
...
{V32_CALL_END}
...
{V32_CALLS_END}

Each call has an invoke element of its own. A parameter that is a text is marked string="true" and \
stands there as it is, neither quoted nor escaped; one of any other type is marked string="false" \
and written as JSON.

The results come back in this form, in the order of the calls; when you are reasoning, reason \
about them before you go on:

<function_results>
<result>$RESULT</result>
</function_results>

{THINK_BEGIN}...{THINK_END}

The tools, each with the JSON schema of its parameters:
<functions>
{_SCHEMAS}
</functions>
"""

logger = logging.getLogger(__name__)


def read_instructions(folder: Path) -> str:
    """The folder's own text, or ours; in it `{tool_schemas}` is still to be replaced."""
    file = folder / ENCODING_FILE
    text = _literal(file) if file.is_file() else None
    if text is None or _SCHEMAS not in text:
        logger.warning(
            "chat: %s of %s has no %s; tools are offered in other words than those that the model "
            "was trained on",
            ENCODING_FILE,
            folder,
            _NAME,
        )
        return OWN_INSTRUCTIONS
    text = text.replace("{dsml_token}", DSML)
    return text.replace("{thinking_start_token}", THINK_BEGIN).replace(
        "{thinking_end_token}", THINK_END
    )


def _literal(file: Path) -> str | None:
    """The string that a Python file assigns to the template's name; None where there is none."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        named = any(isinstance(target, ast.Name) and target.id == _NAME for target in targets)
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if named and isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
    return None


BEGIN = "<｜begin▁of▁sentence｜>"
END = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
_SWITCHES = ("thinking", "enable_thinking")
# the model reasons or does not: the switch says which, and levels are all the same to it
_WITHOUT_EFFECT = ("reasoning_effort",)


class DeepseekV32Encoding:
    """Renders conversations as DeepSeek-V3.2 was trained on them.

    Args:
        instructions: text that offers tools, with the fields of `tool_instructions`.
    """

    # for the choice of parsers, as the source of a template is
    source = f"{THINK_BEGIN} {THINK_END} {V32_CALLS}"
    origin = "DeepSeek-V3.2's own encoding"

    def __init__(self, instructions: str = OWN_INSTRUCTIONS) -> None:
        """Keep the instructions."""
        self._instructions = instructions

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Text of a conversation; the arguments are those of `ChatTemplate.render`.

        Of `kwargs` it knows `thinking` and `enable_thinking`, two names of one switch (default:
        off), and `reasoning_effort`, which changes nothing. Results of tools are shown in the
        order of the calls they name.

        Raises:
            ValueError: the order of roles is not one that the model knows; an unknown variable.
        """
        thinking = _thinking(kwargs)
        roles = [message["role"] for message in messages]
        last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
        offer = ""
        if tools:
            schemas = "\n".join(_json(tool["function"]) for tool in tools)
            offer = "\n\n" + self._instructions.replace("{tool_schemas}", schemas)
        parts = [BEGIN] if roles[:1] == ["system"] else [BEGIN, offer]
        index = 0
        while index < len(messages):
            message, role = messages[index], roles[index]
            opening = THINK_BEGIN if thinking and index >= last_user else THINK_END
            if role == "system":
                parts += [_text(message), offer if index == 0 else ""]
            elif role == "user":
                parts += [USER, _text(message), ASSISTANT, opening]
            elif role == "assistant":
                parts.append(_assistant(message, thinking and index > last_user))
                rest = itertools.islice(messages, index + 1, None)
                results = list(itertools.takewhile(lambda m: m["role"] == "tool", rest))
                if results:
                    parts.append(_render_results(message, results, index + 1) + opening)
                    index += len(results)
            else:
                raise ValueError(
                    f"messages[{index}] is of role {role!r}; results of tools follow the "
                    "assistant's message that calls them"
                )
            index += 1
        return _end(parts, messages, thinking, add_generation_prompt, continue_final_message)


def _thinking(kwargs: Mapping[str, Any]) -> bool:
    """Whether the model is to reason."""
    unknown = [name for name in kwargs if name not in (*_SWITCHES, *_WITHOUT_EFFECT)]
    if unknown:
        raise ValueError(
            f"chat_template_kwargs: has {unknown[0]!r}; DeepSeek-V3.2's encoding knows "
            f"{' and '.join(_SWITCHES)}"
        )
    switches = {name: kwargs[name] for name in _SWITCHES if kwargs.get(name) is not None}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"chat_template_kwargs: {name} is {value!r}; it must be true or false")
    if len(set(switches.values())) > 1:
        raise ValueError(
            "chat_template_kwargs: thinking and enable_thinking differ; they are two names of one "
            "switch"
        )
    return any(switches.values())


def _text(message: Mapping[str, Any]) -> str:
    """Content of a message, empty where it has none."""
    return str(message.get("content") or "")


def _json(value: Any) -> str:
    """JSON as the model knows it."""
    return json.dumps(value, ensure_ascii=False)


def _assistant(message: Mapping[str, Any], shows_reasoning: bool) -> str:
    """A message of the assistant, from after the opening of its turn to its end."""
    reasoning = f"{message.get('reasoning_content') or ''}{THINK_END}" if shows_reasoning else ""
    calls = "\n".join(_call(call["function"]) for call in message.get("tool_calls") or ())
    section = f"\n\n{V32_CALLS}\n{calls}\n{V32_CALLS_END}" if calls else ""
    return f"{reasoning}{_text(message)}{section}{END}"


def _call(function: Mapping[str, Any]) -> str:
    """One call in DSML."""
    lines = [f'{V32_CALL} name="{function["name"]}">']
    for name, value in Arguments.read(function["arguments"]).items():
        is_text = isinstance(value, str)
        kind, text = ("true", value) if is_text else ("false", _json(value))
        lines.append(f'{V32_ARGUMENT} name="{name}" string="{kind}">{text}{V32_ARGUMENT_END}')
    return "\n".join([*lines, *([] if lines[1:] else [""]), V32_CALL_END])


def _render_results(
    message: Mapping[str, Any], results: Sequence[Mapping[str, Any]], start: int
) -> str:
    """Results in the order of the calls of `message`, up to the opening of the next turn."""
    calls = message.get("tool_calls") or ()
    if len(results) > len(calls):
        raise ValueError(
            f"messages[{start + len(calls)}] is a result of a tool, but the assistant's message "
            f"before it has {len(calls)} calls; send one result for each call"
        )
    order = {call.get("id"): place for place, call in enumerate(calls) if call.get("id")}
    named = [order.get(result.get("tool_call_id"), -1) for result in results]
    if -1 not in named and len(set(named)) == len(named):
        in_order = sorted(zip(named, results, strict=True), key=itemgetter(0))
        results = [result for _, result in in_order]
    lines = "".join(f"\n<result>{_text(result)}</result>" for result in results)
    return f"\n\n<function_results>{lines}\n</function_results>\n\n"


def _end(
    parts: Sequence[str],
    messages: Sequence[Mapping[str, Any]],
    thinking: bool,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> str:
    """The prompt, ended as it was asked for."""
    text = "".join(parts)
    last = messages[-1] if messages else {"role": "system"}
    opening = THINK_BEGIN if thinking else THINK_END
    if continue_final_message:
        if last["role"] != "assistant" or last.get("tool_calls"):
            raise ValueError(
                "the last message is not the text of an assistant; continue_final_message goes on "
                "with that"
            )
        text = text[: -len(END)]
        in_reasoning = thinking and is_reasoning_only(last)
        return text.removesuffix(THINK_END) if in_reasoning else text
    if last["role"] == "assistant":
        if add_generation_prompt:
            raise ValueError(
                "the last message is the assistant's; set continue_final_message to go on with it, "
                "or add_generation_prompt to false"
            )
        return text
    if last["role"] == "system":
        return text + ASSISTANT + opening if add_generation_prompt else text
    ending = (ASSISTANT if last["role"] == "user" else "") + opening
    return text if add_generation_prompt else text.removesuffix(ending)
