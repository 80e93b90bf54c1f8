"""Which parsers of answers belong to a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fd_dsa.chat.history import is_reasoning_only
from fd_dsa.chat.parser import THINK_BEGIN, THINK_END
from fd_dsa.chat.tool_formats import (
    DSML,
    GLM_KEY,
    V31_CALLS,
    DeepseekV31Tools,
    DeepseekV32Tools,
    GlmTools,
    ToolFormat,
)

TOOL_FORMATS: dict[str, ToolFormat] = {
    "deepseek_v31": DeepseekV31Tools(),
    "deepseek_v32": DeepseekV32Tools(),
    "glm45": GlmTools(),
    "glm47": GlmTools(),
}
"""Names as of vLLM's `--tool-call-parser`; both forms of GLM are read by one parser."""
REASONING_FORMATS = ("deepseek_v3", "glm45")
"""Names as of vLLM's `--reasoning-parser`; all of them put <think> and </think> around it."""
AUTO, NONE = "auto", "none"
# in this order: what only this format's prompts show
_SIGNS = ((DSML, "deepseek_v32"), (V31_CALLS, "deepseek_v31"), (GLM_KEY, "glm47"))


def tool_format_name(name: str, source: str) -> str:
    """Name of the format of tool calls; "none" where none are looked for.

    Args:
        name: one of `TOOL_FORMATS`, "none", or "auto", which goes by the source.
        source: text of the template, which contains the marks of its formats.
    """
    if name != AUTO:
        return name
    return next((tool_format for sign, tool_format in _SIGNS if sign in source), NONE)


def find_tool_format(name: str, source: str) -> ToolFormat | None:
    """The format that `tool_format_name` names; None where no calls are looked for."""
    return TOOL_FORMATS.get(tool_format_name(name, source))


def reasoning_format_name(name: str, source: str) -> str:
    """Name of the form that reasoning has; "none" where none is looked for.

    Args:
        name: one of `REASONING_FORMATS`, "none", or "auto", which goes by the source.
        source: text of the template, which contains the marks of its formats.
    """
    if name != AUTO:
        return name
    if THINK_END not in source:
        return NONE
    return "glm45" if GLM_KEY in source else "deepseek_v3"


def has_reasoning(name: str, source: str) -> bool:
    """Whether <think>...</think> at the beginning of an answer is reasoning."""
    return reasoning_format_name(name, source) != NONE


def opens_reasoning(prompt: str, continued: Mapping[str, Any] | None) -> bool:
    """Whether an answer begins inside of the reasoning.

    Args:
        prompt: as rendered.
        continued: the last message where the answer goes on with it.
    """
    if continued is not None and is_reasoning_only(continued):
        return prompt.rfind(THINK_BEGIN) > prompt.rfind(THINK_END)
    return prompt.rstrip().endswith(THINK_BEGIN)
