"""Tokenizer of a Hugging Face model folder, over the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel

from fd_dsa.engine.chat_template import ChatTemplate, read_template_source
from fd_dsa.errors import ConfigError

_SPECIAL_TOKEN_FIELDS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Text to token ids and back, and the chat template of the folder.

    Args:
        backend: the tokenizer read from tokenizer.json.
        special_tokens: names such as "bos_token" -> text, as in tokenizer_config.json.
        chat_template: compiled template, or None when the folder has none.
        add_bos_token: put bos_token before a text where the post-processor does not.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        add_bos_token: bool = False,
    ) -> None:
        """Keep the parts and look up the ids of the special tokens."""
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._chat_template = chat_template
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        processed = backend.encode("", add_special_tokens=True).ids
        self._prepend_bos = add_bos_token and self.bos_token_id not in processed

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Tokenizer of a folder with tokenizer.json.

        tokenizer_config.json (special tokens, add_bos_token, chat template) and
        chat_template.jinja, which goes before the template of the former, are optional.

        Raises:
            ConfigError: a file is missing or cannot be parsed; names the file.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"tokenizer: {file} is missing; the folder needs a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"tokenizer: {file} cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        source = read_template_source(folder, config)
        template = None if source is None else ChatTemplate(source, special_tokens)
        return cls(backend, special_tokens, template, bool(config.get("add_bos_token")))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """True when `apply_chat_template` can be used."""
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; special tokens written in it become their ids.
            add_special_tokens: apply the post-processor and add_bos_token.

        Raises:
            ValueError: the text holds a lone surrogate and is no valid Unicode.
        """
        try:
            ids = list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"the text cannot be encoded as UTF-8: {error}") from error
        if add_special_tokens and self._prepend_bos and self.bos_token_id is not None:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that form no character become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: dicts with "role" and "content".
            add_generation_prompt: end with the start of an assistant message.
            kwargs: further variables of the template.

        Raises:
            ValueError: the folder has no template, or the template refuses the messages.
        """
        if self._chat_template is None:
            raise ValueError(
                "the model folder has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); send a plain prompt instead of messages"
            )
        text = self._chat_template.render(messages, add_generation_prompt, **kwargs)
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """Bytes of every token id, special tokens included.

        None unless the decoder is byte-level: only there is a text the concatenation of its
        tokens' bytes. Ids without a token are empty.
        """
        if not isinstance(self._backend.decoder, ByteLevel):
            return None
        vocab = self._backend.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocab.values(), default=-1) + 1)
        byte_of_char = _byte_level_alphabet()
        for token, token_id in vocab.items():
            try:
                table[token_id] = bytes([byte_of_char[char] for char in token])
            except KeyError:
                table[token_id] = token.encode()
        return table

    @cached_property
    def text_token_bytes(self) -> list[bytes] | None:
        """Like `token_bytes`, with nothing for special tokens."""
        if self.token_bytes is None:
            return None
        table = list(self.token_bytes)
        for token_id, token in self._backend.get_added_tokens_decoder().items():
            if token.special:
                table[token_id] = b""
        return table

    def _id_of(self, name: str) -> int | None:
        """Id of a named special token, None when it has none."""
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet (GPT-2's): no control character or space.

    Printable Latin-1 bytes stand for themselves, the other bytes for U+0100 onwards in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


def _read_json(file: Path) -> dict[str, Any]:
    """Object of a JSON file, empty when the file does not exist."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"tokenizer: {file} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"tokenizer: {file} holds a {type(content).__name__}, not an object")
    return content


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens of tokenizer_config.json, written as text or as an object."""
    found = {}
    for name in _SPECIAL_TOKEN_FIELDS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
