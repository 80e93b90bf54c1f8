"""What makes prompts of conversations: which of the renderers a model folder has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fd_dsa.chat.deepseek_v32 import ASSISTANT, USER, DeepseekV32Encoding
from fd_dsa.chat.template import ChatTemplate, read_template
from fd_dsa.chat.tool_instructions import read_instructions
from fd_dsa.errors import ConfigError


class ChatRenderer(Protocol):
    """Makes prompts of conversations."""

    @property
    def source(self) -> str:
        """Text in which the marks of the model's formats stand."""

    @property
    def origin(self) -> str:
        """Where it comes from, for people; no path."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """See `ChatTemplate.render`."""


def read_renderer(
    folder: Path,
    tokenizer_config: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    model_type: str | None,
    has_token: Callable[[str], bool],
    template_file: Path | None = None,
) -> ChatRenderer | None:
    """What renders the conversations of a model folder, None where nothing does.

    `template_file` takes precedence, then the folder's chat_template.jinja, then `chat_template`
    of its tokenizer_config.json. A folder of DeepSeek-V3.2 without any has the model's own
    encoding.

    Args:
        folder: of the model.
        tokenizer_config: content of tokenizer_config.json.
        special_tokens: names such as "bos_token" -> text.
        model_type: of config.json.
        has_token: whether a text is one token of the vocabulary.
        template_file: a Jinja file instead of the folder's.

    Raises:
        ConfigError: a template cannot be read or compiled.
    """
    if template_file is not None:
        origin = f"--chat-template {template_file.name}"
        return ChatTemplate(_read_template_file(template_file), special_tokens, origin)
    template = read_template(folder, dict(tokenizer_config), special_tokens)
    if template is not None:
        return template
    if model_type == "deepseek_v32" and has_token(USER) and has_token(ASSISTANT):
        return DeepseekV32Encoding(read_instructions(folder))
    return None


def _read_template_file(file: Path) -> str:
    """Text of `--chat-template`."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat-template: got {str(file)!r}, allowed: a readable file with a Jinja template; "
            f"{error}"
        ) from error
