"""How a server talks: what makes its prompts, and what reads its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fd_dsa.chat.parsers import reasoning_format_name, tool_format_name

if TYPE_CHECKING:
    from fd_dsa.engine.tokenizer import Tokenizer
    from fd_dsa.serve.options import ChatSettings


def chat_formats(tokenizer: Tokenizer, settings: ChatSettings) -> dict[str, str | None]:
    """Origin of the chat template and names of the parsers; None where there is no chat.

    Args:
        tokenizer: of the model.
        settings: what the flags say; "auto" is resolved by the template.
    """
    renderer = tokenizer.chat_renderer
    if renderer is None:
        return dict.fromkeys(("chat_template", "tool_call_parser", "reasoning_parser"))
    return {
        "chat_template": renderer.origin,
        "tool_call_parser": tool_format_name(settings.tool_call_parser, renderer.source),
        "reasoning_parser": reasoning_format_name(settings.reasoning_parser, renderer.source),
    }


def chat_line(formats: dict[str, str | None]) -> str:
    """The line of the log about `chat_formats`."""
    if formats["chat_template"] is None:
        return "chat: none, the folder has no template; --chat-template FILE gives it one"
    return (
        f"chat: prompts by {formats['chat_template']}, tool calls {formats['tool_call_parser']}, "
        f"reasoning {formats['reasoning_parser']}"
    )
