"""Selection of the chat template of a model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fd_dsa.chat.deepseek_encoding import (
    DeepseekV4Encoding,
    DeepseekV32Encoding,
    read_instructions,
    read_v4_words,
)
from fd_dsa.chat.template import MAX_TEMPLATE_BYTES, ChatTemplate
from fd_dsa.command_line.inputs import read_bounded
from fd_dsa.errors import ConfigError, shorten, system_reason

NO_TEMPLATE = (
    "the model folder has no chat template (neither chat_template.jinja nor chat_template in "
    "tokenizer_config.json)"
)
"""Reason why a folder has no chat, if it has no invalid template."""

TEMPLATE_FILE = "chat_template.jinja"

_SPECIAL_TOKEN_FIELDS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_DEEPSEEK_TURNS = ("<｜User｜>", "<｜Assistant｜>")
# newest tool-call format of a family -> the encoding of its folders, which have no template
_ENCODINGS: dict[str, Callable[[Path], ChatTemplate]] = {
    "deepseek_v32": lambda folder: DeepseekV32Encoding(read_instructions(folder)),
    "deepseek_v4": lambda folder: DeepseekV4Encoding(read_v4_words(folder)),
}


def read_renderer(
    folder: Path,
    tokenizer_config: Mapping[str, object],
    special_tokens: Mapping[str, str],
    family_formats: Sequence[str],
    has_token: Callable[[str], bool],
    template_file: Path | None = None,
) -> ChatTemplate | None:
    """Return the renderer of a model folder's conversations, or None without one.

    `template_file` takes precedence, then the folder's chat_template.jinja, then `chat_template` of
    its tokenizer_config.json. From a list of named templates the one named "default" is used. A
    folder of DeepSeek-V3.2 or V4 without a template gets the model's own encoding.

    Raises:
        ConfigError: a template cannot be read or compiled, or has a wrong type. The message names
            the file.
    """
    file = template_file or folder / TEMPLATE_FILE
    origin = file.name if template_file is None else f"--chat-template {file.name}"
    if template_file is not None or file.is_file():
        try:
            text = read_bounded(file, MAX_TEMPLATE_BYTES, "shorten it").decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = system_reason(error)
            raise ConfigError(f"chat template of {origin}: cannot be read: {reason}") from error
        except ConfigError as error:
            raise ConfigError(f"chat template of {origin}: {error}") from None
        return ChatTemplate(text, special_tokens, origin, family_formats)
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
        return ChatTemplate(source, special_tokens, "tokenizer_config.json", family_formats)
    encoding = _ENCODINGS.get(next(iter(family_formats), ""))
    return encoding(folder) if encoding and all(map(has_token, _DEEPSEEK_TURNS)) else None


def read_special_tokens(
    folder: Path, tokenizer_config: Mapping[str, object], id_of: Callable[[str], int | None]
) -> tuple[dict[str, str], bool]:
    """Return special tokens of tokenizer_config.json by name, and its `add_bos_token`.

    Each token is a string or an object.

    Raises:
        ConfigError: one has a wrong type, or `add_bos_token` is true without a bos_token.
    """
    texts = {}
    for name in _SPECIAL_TOKEN_FIELDS:
        given = value = tokenizer_config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            texts[name] = value
        elif given is not None:
            raise _error(folder, name, given, "a text, null, or an object with a text as content")
    add_bos = tokenizer_config.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise _error(folder, "add_bos_token", add_bos, "true, false, null")
    if add_bos and id_of(bos := texts.get("bos_token", "")) is None:
        allowed = "a token of tokenizer.json, because add_bos_token is true"
        raise _error(folder, "bos_token", bos, allowed)
    return texts, bool(add_bos)


def _error(folder: Path, name: str, got: object, allowed: str) -> ConfigError:
    file = folder / "tokenizer_config.json"
    return ConfigError(f"{file}: {name}: got {shorten(got)}, allowed: {allowed}")
