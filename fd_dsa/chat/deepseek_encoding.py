"""Encodings of conversations for the DeepSeek models whose folders have no template.

DeepSeek-V3.2 is trained on one text that offers tools. The text is a literal in
`encoding/encoding_dsv32.py` of the model's folder. The file is parsed for that literal and never
run. A copy of the model without the file gets our words for the same format,
`deepseek_v32_tools.txt`.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fd_dsa.chat.parser import THINK_BEGIN, THINK_END
from fd_dsa.chat.template import SWITCHES, ChatTemplate
from fd_dsa.chat.tool_formats import DSML

logger = logging.getLogger(__name__)

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
            if name not in SWITCHES:
                raise ValueError(
                    f"chat_template_kwargs: has {name!r}; DeepSeek-V3.2's encoding knows "
                    f"{' and '.join(SWITCHES)}"
                )
            if not isinstance(kwargs[name], bool | None):
                raise ValueError(
                    f"chat_template_kwargs: {name} is {kwargs[name]!r}; it must be true or false"
                )
        if {True, False} <= {kwargs.get(name) for name in SWITCHES}:
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
