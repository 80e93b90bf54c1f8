"""Chat templates of model folders: Jinja in a sandbox, with the names that templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fd_dsa.errors import ConfigError


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        special_tokens: variables such as bos_token which the template may use.

    Raises:
        ConfigError: the template does not compile.

    Source: the environment is that of Hugging Face's chat templates, so that the templates of
    model folders render alike.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Compile the template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"chat template: line {error.lineno} is no valid Jinja: {error.message}"
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, **kwargs: Any
    ) -> str:
        """Text of a conversation.

        Raises:
            ValueError: the template refuses the messages, or fails on them.
        """
        variables = {**self._special_tokens, "tools": None, "documents": None, **kwargs}
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ValueError(f"chat template: {error}") from error


def read_template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """Jinja text of a folder, None when it has none.

    chat_template.jinja goes before `chat_template` of tokenizer_config.json; of a list of named
    templates the one named "default" counts.

    Raises:
        ConfigError: `chat_template` is of another type.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ConfigError(
            f"chat template: chat_template of {folder / 'tokenizer_config.json'} is a "
            f"{type(value).__name__}; it must be a string or a list of named templates"
        )
    named = {entry.get("name"): entry.get("template") for entry in value}
    return named.get("default")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    """Let a template refuse a conversation."""
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    """Local date and time in the given form."""
    return datetime.now().strftime(pattern)
