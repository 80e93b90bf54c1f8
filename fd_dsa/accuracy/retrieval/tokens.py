"""How long a prompt is: counted with a tokenizer folder, compared with what the server says."""

from __future__ import annotations

import json
from collections import Counter as Counts
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import ConfigError


class TokenCounter:
    """Counts tokens with the tokenizer and the chat template of a model folder.

    Args:
        folder: with tokenizer.json; config.json is read where it is there.
        thinking: handed to the chat template as the client does; None leaves it its default.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """

    def __init__(self, folder: Path, thinking: bool | None = None) -> None:
        if not folder.is_dir():
            raise ConfigError(f"--tokenizer: {folder} is no folder")
        self.folder = folder
        self._tokenizer = Tokenizer.from_folder(folder)
        switch = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        self._kwargs: dict[str, Any] = dict(switch)
        config = _config(folder / "config.json")
        self.index_topk = _positive(config, "index_topk", folder)
        self.max_position_embeddings = _positive(config, "max_position_embeddings", folder)

    def text(self, text: str) -> int:
        """Tokens of a text that stands inside a longer one."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, content: str) -> int:
        """Tokens of a conversation of this one user message, start of the answer included.

        Without a chat template those of the text alone, with the tokenizer's own special tokens.

        Raises:
            ConfigError: the template refuses the message.
        """
        if not self._tokenizer.has_chat_template:
            return len(self._tokenizer.encode(content))
        messages = [{"role": "user", "content": content}]
        try:
            return len(self._tokenizer.apply_chat_template(messages, **self._kwargs))
        except ValueError as error:
            raise ConfigError(f"--tokenizer: {self.folder}: {error}") from error


@dataclass(frozen=True)
class LengthCheck:
    """The server's counts against ours.

    Attributes:
        compared: prompts whose tokens the server counted.
        differences: server's minus ours -> number of prompts.
    """

    compared: int
    differences: dict[int, int]

    @property
    def exact(self) -> bool:
        """True if every count agrees; needs at least one."""
        return set(self.differences) == {0}

    def in_words(self) -> str:
        """One sentence for reports."""
        if not self.compared:
            return "The server does not say how many tokens a prompt has: lengths are ours alone."
        if self.exact:
            return f"The server counts the same lengths ({self.compared} prompts)."
        if len(self.differences) == 1:
            (difference,) = self.differences
            return (
                f"The server counts {difference:+d} tokens in every prompt ({self.compared}): its "
                "chat template is another one; add that to the lengths."
            )
        low, high = min(self.differences), max(self.differences)
        return (
            f"WARNING: the server counts {low:+d} to {high:+d} tokens against ours, not always the "
            "same: this tokenizer is not the served model's, the lengths are wrong; give its "
            "folder with --tokenizer."
        )

    def to_json(self) -> dict[str, Any]:
        """The check as a JSON object."""
        differences = {str(key): count for key, count in sorted(self.differences.items())}
        return {"compared": self.compared, "server_minus_ours": differences}


def check_lengths(pairs: Iterable[tuple[int, int | None]]) -> LengthCheck:
    """The check of pairs (our count, the server's or None)."""
    found = Counts(theirs - ours for ours, theirs in pairs if theirs is not None)
    return LengthCheck(sum(found.values()), dict(found))


def _config(file: Path) -> dict[str, Any]:
    """Object of config.json, empty when there is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"--tokenizer: {file} is no valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _positive(config: dict[str, Any], name: str, folder: Path) -> int | None:
    """A positive integer of config.json, None when it is not there."""
    value = config.get(name)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"--tokenizer: {folder / 'config.json'}: {name}: got {value!r}; must be above 0"
        )
    return value
