"""Tokenizer of a Hugging Face model folder, based on the `tokenizers` library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import Decoder

from fd_dsa.chat.control import RenderedPrompt, render_prompt
from fd_dsa.chat.json_text import NOT_UNICODE
from fd_dsa.chat.renderers import NO_TEMPLATE, TEMPLATE_FILE, read_renderer, read_special_tokens
from fd_dsa.chat.template import ChatTemplate
from fd_dsa.engine.byte_level import byte_table
from fd_dsa.engine.encoding import ControlTokens, encode_text
from fd_dsa.environment import set_default
from fd_dsa.errors import ConfigError
from fd_dsa.models.config_reader import check_file, has_file, read_json_object

# token of a byte in a vocabulary with byte fallback
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
# two noncharacters, which every decoder leaves unchanged and no text contains
_MARK = "\U0010fffe\U0010fffe"
# up to this number of ids, decoding takes less time than a release of the GIL
_MAX_IDS_WITH_GIL = 256
# number of single tokens decoded in one call
_DECODED_AT_ONCE = 8192
# number of tokens that are compared to see if a text is the concatenation of its tokens
_COMPARED_TOKENS = 256


class Tokenizer:
    """Text to token ids and back, and the chat template of the folder.

    Args:
        backend: tokenizer that was read from tokenizer.json.
        special_tokens: names such as "bos_token" -> text, as in tokenizer_config.json.
        chat_renderer: template that renders conversations, or None.
        add_bos_token: True = put bos_token before a text, unless the post-processor does.
        why_no_chat: reason for errors of chat requests if there is no template.

    Attributes:
        backend, special_tokens, chat_renderer, why_no_chat: as given.
        bos_token_id, eos_token_id: ids of these special tokens, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        chat_renderer: ChatTemplate | None = None,
        add_bos_token: bool = False,
        why_no_chat: str = NO_TEMPLATE,
    ) -> None:
        # work only in the calling thread, because the engine needs the other processors
        set_default("TOKENIZERS_PARALLELISM", "false")
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_renderer = chat_renderer
        self.why_no_chat = why_no_chat
        # by the special tokens that a request keeps; a server has one or two such sets
        self._text_tables: dict[frozenset[int], list[bytes] | None] = {}
        self.bos_token_id, self.eos_token_id = (
            backend.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None
            for name in ("bos_token", "eos_token")
        )
        processed = backend.encode("", add_special_tokens=True).ids
        self._prepend_bos = add_bos_token and self.bos_token_id not in processed

    @classmethod
    def from_folder(
        cls, path: str | Path, chat_template: str | os.PathLike[str] | None = None
    ) -> Tokenizer:
        """Read the tokenizer of a folder with tokenizer.json.

        tokenizer_config.json (special tokens, add_bos_token, chat template) is optional. See
        `fd_dsa.chat.renderers.read_renderer` for chat templates. A broken one disables chat.
        `add_eos_token` has no effect, as in transformers 5: only a post-processor of tokenizer.json
        puts eos_token after a text. A completion cannot continue a prompt that has ended.

        Args:
            path: folder of the model.
            chat_template: Jinja file to use instead of the folder's template.

        Raises:
            ConfigError: a file is missing or damaged. The message names the file.
        """
        # imported late, because a server imports this module before its engine starts
        from fd_dsa.models.registry import FAMILIES

        folder = Path(path)
        file = folder / "tokenizer.json"
        if not has_file(file):
            raise ConfigError(f"tokenizer: {file} is missing; the folder needs a tokenizer.json")
        check_file(file)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"tokenizer: {file} cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens, add_bos = read_special_tokens(folder, config, backend.token_to_id)
        family = FAMILIES.get(str(_read_json(folder / "config.json").get("model_type")))
        renderer, why_no_chat = None, NO_TEMPLATE
        if chat_template is None and has_file(folder / TEMPLATE_FILE):
            check_file(folder / TEMPLATE_FILE)
        try:
            renderer = read_renderer(
                folder,
                config,
                special_tokens,
                family.chat_formats if family else (),
                lambda token: backend.token_to_id(token) is not None,
                None if chat_template is None else Path(chat_template),
            )
        except ConfigError as error:
            # the operator has named this file; completions need no template of the folder
            if chat_template is not None:
                raise
            why_no_chat = str(error)
        return cls(backend, special_tokens, renderer, add_bos, why_no_chat)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def highest_token_id(self) -> int:
        """Highest id of a token, including added ones. -1 without tokens."""
        # without `token_bytes`, which has a place for each id up to this one
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def has_chat_template(self) -> bool:
        """True if `apply_chat_template` can be used."""
        return self.chat_renderer is not None

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        masked: str | None = None,
    ) -> list[int]:
        """Return the token ids of a text. Other threads run meanwhile.

        Args:
            text: any text; markers of control tokens in it become their ids.
            add_special_tokens: True = apply the post-processor and add_bos_token.
            max_tokens: maximum number of ids without the one of add_bos_token; None = unlimited.
            masked: `fd_dsa.chat.control.RenderedPrompt.masked`; markers that are not in it are
                text. It needs `add_special_tokens` False.

        Raises:
            TooManyTokens: the text has more tokens. The rest of it is not read.
            ValueError: the text has a lone surrogate, so it is no valid Unicode.
        """
        try:
            if masked is not None and masked != text:
                return self.control_tokens.encode(text, masked, max_tokens)
            ids = encode_text(
                self.backend,
                text,
                add_special_tokens,
                max_tokens,
                longest_added_token=self._longest_added_token,
            )
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(NOT_UNICODE) from error
        if add_special_tokens and self._prepend_bos and self.bos_token_id is not None:
            ids.insert(0, self.bos_token_id)
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several short texts in one call, without special tokens.

        Raises:
            ValueError: a text has a lone surrogate.
        """
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(NOT_UNICODE) from error
        return [encoding.ids for encoding in encodings]

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        kept: frozenset[int] = frozenset(),
    ) -> str:
        """Decode token ids. Bytes that form no character become U+FFFD.

        An added token decodes to its content. `tokenizers` sends the content through the decoder,
        which changes characters that have another meaning in the vocabulary.

        Args:
            token_ids: ids of the text.
            skip_special_tokens: True = leave special tokens out, except for `kept`.
            kept: special tokens that stay in the text.
        """
        if skip_special_tokens and kept:
            left_out = self._special_ids - kept
            token_ids = [token_id for token_id in token_ids if token_id not in left_out]
            skip_special_tokens = False
        ids = list(token_ids)
        if not self._changed_tokens.isdisjoint(ids):
            left_out = self._special_ids if skip_special_tokens else frozenset()
            return self._decode_pieces([i for i in ids if i not in left_out])
        if len(ids) <= _MAX_IDS_WITH_GIL:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        (text,) = self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each single token, also of special tokens."""
        texts = {i: self._added_tokens[i].content for i in self._changed_tokens}
        distinct = list(set(token_ids) - self._changed_tokens)
        for begin in range(0, len(distinct), _DECODED_AT_ONCE):
            some = distinct[begin : begin + _DECODED_AT_ONCE]
            alone = [[token_id] for token_id in some]
            decoded = self.backend.decode_batch(alone, skip_special_tokens=False)
            texts.update(zip(some, decoded, strict=True))
        return [texts[token_id] for token_id in token_ids]

    def _decode_pieces(self, token_ids: list[int]) -> str:
        """Decode token ids, some of which are in `_changed_tokens`."""
        if (table := self.token_bytes) is not None:
            spelled = [table[i] for i in token_ids if i < len(table)]
            return b"".join(spelled).decode(errors="replace")
        changed, decoder = self._changed_tokens, self.backend.decoder
        pieces = [_MARK if i in changed else self.backend.id_to_token(i) for i in token_ids]
        known = [piece for piece in pieces if piece is not None]
        text = " ".join(known) if decoder is None else decoder.decode(known)
        contents = iter([self._added_tokens[i].content for i in token_ids if i in changed])
        return re.sub(_MARK, lambda _: next(contents, _MARK), text)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, object]], *args: Any, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a conversation. The arguments are those of `render_chat`."""
        prompt = self.render_chat(messages, *args, **kwargs)
        return self.encode(prompt.text, add_special_tokens=False, masked=prompt.masked)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        *,
        allow_special_tokens_in_text: bool = False,
        **kwargs: Any,
    ) -> RenderedPrompt:
        """Render a conversation.

        Args:
            messages: dicts with "role" and "content".
            add_generation_prompt: True = end with the start of an assistant message.
            allow_special_tokens_in_text: True = markers in texts become control tokens too.
            kwargs: `tools`, `continue_final_message`, and further variables of the template; see
                `fd_dsa.chat.template.ChatTemplate.render`.

        Raises:
            ValueError: the folder has no valid template, or the template refuses the messages.
        """
        if self.chat_renderer is None:
            raise ValueError(f"{self.why_no_chat}; send a plain prompt instead of messages")
        control = None if allow_special_tokens_in_text else self.control_tokens
        return render_prompt(self.chat_renderer, control, messages, add_generation_prompt, **kwargs)

    def special_ids_of(self, texts: Iterable[str]) -> dict[str, int]:
        """Return the texts that are special tokens, and their ids."""
        special = {t.content: i for i, t in self._added_tokens.items() if t.special}
        return {text: special[text] for text in texts if text in special}

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """Bytes of every token id, also of special tokens. Ids without a token have no bytes.

        None if the decoder is not byte-level, because then a text is not the concatenation of the
        bytes of its tokens.
        """
        if not _is_byte_level(self.backend.decoder):
            return None
        contents = {i: token.content for i, token in self._added_tokens.items()}
        return byte_table(self.backend.get_vocab(with_added_tokens=True), contents)

    def text_token_bytes(self, kept: frozenset[int] = frozenset()) -> list[bytes] | None:
        """Return `token_bytes` without the bytes of special tokens that are not in `kept`."""
        if kept not in self._text_tables:
            table = None
            if self.token_bytes is not None:
                table = list(self.token_bytes)
                for token_id in self._special_ids - kept:
                    table[token_id] = b""
            self._text_tables[kept] = table
        return self._text_tables[kept]

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """Added tokens that control the model."""
        return ControlTokens(self.backend)

    @cached_property
    def _added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """Added tokens by id."""
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def _changed_tokens(self) -> frozenset[int]:
        """Ids of the added tokens that the decoder of `tokenizers` changes."""
        changed = set()
        for token_id, token in self._added_tokens.items():
            # at the beginning of a text and after a token
            text = self.backend.decode([token_id] * 2, skip_special_tokens=False)
            if text not in (token.content * 2, f"{token.content} {token.content}"):
                changed.add(token_id)
        return frozenset(changed)

    @cached_property
    def _longest_added_token(self) -> int:
        """Length of the longest added token, characters. 0 without added tokens."""
        return max((len(token.content) for token in self._added_tokens.values()), default=0)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(i for i, token in self._added_tokens.items() if token.special)

    def shown_special_ids(self, skip_special_tokens: bool, kept: frozenset[int]) -> frozenset[int]:
        """Return ids of the special tokens that stay in a text decoded with these settings."""
        return self._special_ids & kept if skip_special_tokens else self._special_ids

    def pieces(self, shown: frozenset[int]) -> list[bytes]:
        """Return the bytes that each token id adds to a text.

        Args:
            shown: special tokens that stay in the text. The other special tokens add no bytes.

        Raises:
            ValueError: the text of a token depends on its neighbours, so it has no fixed bytes.
        """
        table = self.text_token_bytes(shown)
        if table is not None:
            return table.copy()
        pieces = [self.piece_bytes(token_id) for token_id in range(self.highest_token_id + 1)]
        # leave out bytes of longer characters, because one byte decodes to no text
        ordinary = [
            i
            for i, piece in enumerate(pieces)
            if (piece.isascii() or len(piece) > 1) and piece and i not in self._added_tokens
        ]
        some = ordinary[:: len(ordinary) // _COMPARED_TOKENS + 1]
        joined = b"".join([pieces[token_id] for token_id in some]).decode(errors="replace")
        # the decoder may drop a space at the beginning of a text
        if joined.strip() != self.decode(some).strip():
            raise ValueError(
                "the decoder of tokenizer.json writes a token by its neighbours, so that no token "
                "has a text of its own"
            )
        for token_id in self._special_ids - shown:
            pieces[token_id] = b""
        return pieces

    def piece_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a single token, also of a special token.

        An id without a token has no bytes, and an added token has those of its content. If the
        decoder is not byte-level, the text of a token may depend on its neighbours. The bytes are
        then those of the token in the vocabulary, with a space for its word mark.
        """
        table = self.token_bytes
        if table is not None:
            return table[token_id] if token_id < len(table) else b""
        if token_id in self._added_tokens:
            return self._added_tokens[token_id].content.encode()
        piece = self.backend.id_to_token(token_id) or ""
        byte = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _is_byte_level(decoder: Decoder | None) -> bool:
    """Return True if a decoder only maps the characters of tokens to bytes."""
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    kinds = {step["type"] for step in state.get("decoders", [state])}
    return "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}


def _read_json(file: Path) -> dict[str, Any]:
    """Return the object of a JSON file, empty if the file does not exist."""
    return read_json_object(file) if has_file(file) else {}
