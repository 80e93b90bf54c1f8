"""Bytes of the tokens of byte-level vocabularies."""

from __future__ import annotations

from collections.abc import Mapping


def byte_table(vocab: Mapping[str, int], added: Mapping[int, str]) -> list[bytes]:
    """Return the bytes of every token id. Ids without a token have no bytes.

    Args:
        vocab: token as it is written -> id, added tokens included.
        added: id -> content of the added tokens, which are their own text.
    """
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    byte_of_char = _alphabet()
    for token, token_id in vocab.items():
        try:
            table[token_id] = bytes([byte_of_char[char] for char in token])
        except KeyError:
            table[token_id] = token.encode()
    for token_id, content in added.items():
        table[token_id] = content.encode()
    return table


def _alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet (GPT-2's): no control character or space.

    Printable Latin-1 bytes stand for themselves, the other bytes for U+0100 onwards in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet
