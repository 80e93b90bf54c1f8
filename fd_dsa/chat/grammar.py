"""Grammars that force tool calls, in llguidance's variant of Lark.

`tool_choice` "required", or the name of a tool, is enforced by decoding under a grammar of the
model's own format. So the same parser reads forced and free calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fd_dsa.chat import tool_formats as marks
from fd_dsa.chat.call_grammar import CallWriter
from fd_dsa.chat.lark import Lark
from fd_dsa.chat.schema import SchemaError, ToolSchema


def forced_calls_grammar(tool_format: str, schemas: Mapping[str, object], *, several: bool) -> str:
    """Return a grammar of answers that consist of calls only, at least one.

    Every call under the grammar satisfies its tool's schema, and the parser of answers reads each
    value with the type of the schema.

    Args:
        schemas: name of each tool that may be called -> JSON schema of its arguments.
        several: allow more than one call.

    Returns:
        Lark text with the rule `start`.

    Raises:
        ValueError: a schema cannot be enforced, or the text is too long. The message names the tool
            and the keyword.
    """
    lark = Lark()
    head, write, tail = CALL_FORMS[tool_format]
    choices = []
    spent = 0
    for name, of in schemas.items():
        schema = ToolSchema(of, spent)
        try:
            choices.append(write(CallWriter(lark, name, schema)))
        except SchemaError as error:
            raise ValueError(
                f"tools: the parameters of {name!r} cannot be forced: {error}"
            ) from error
        except ValueError as error:
            raise ValueError(f"tools: at {name!r} {error}") from error
        spent = schema.spent
    calls = lark.one_of(choices)
    parts = [lark.literal(head)] if head else []
    parts += [f"{calls}+" if several else calls, *([lark.literal(tail)] if tail else [])]
    return lark.grammar(" ".join(parts))


# tool format -> text before all calls, writer of one call, text after all calls
CALL_FORMS: dict[str, tuple[str, Callable[[CallWriter], str], str]] = {
    "deepseek_v31": (marks.V31_CALLS, CallWriter.v31_call, marks.V31_CALLS_END),
    "deepseek_v32": (f"\n\n{marks.V32_CALLS}\n", CallWriter.dsml_call, marks.V32_CALLS_END),
    "deepseek_v4": (f"\n\n{marks.V4_CALLS}\n", CallWriter.dsml_call, marks.V4_CALLS_END),
    "glm47": ("", CallWriter.glm_call, ""),
}
