"""The text that offers tools to DeepSeek-V3.2.

The model was trained on one text. It is in `encoding/encoding_dsv32.py` of its folder, from
where it is read as the literal that it is; nothing of that file is run. Copies of the model that
lack the file get our words for the same format.
"""

from __future__ import annotations

import ast
import logging
from pathlib import Path

from fd_dsa.chat.parser import THINK_BEGIN, THINK_END
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
    fields = {
        "{dsml_token}": DSML,
        "{thinking_start_token}": THINK_BEGIN,
        "{thinking_end_token}": THINK_END,
    }
    for field, value in fields.items():
        text = text.replace(field, value)
    return text


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
