"""Parts of the cases of the siege: what a kind of requests is, and how one is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tests.soak.hostile import JSON, POSTS, HostileRequest

COMPLETIONS, CHAT, RESPONSES, INPUT_TOKENS, MESSAGES, COUNT_TOKENS, TOKENIZE, DETOKENIZE = POSTS
LONGEST_BODY = 16 * 2**20
MEGABYTE = 10**6
USER = [{"role": "user", "content": "a"}]


@dataclass(frozen=True)
class Facts:
    """Facts that the requests depend on: tokens of the context and of the vocabulary."""

    max_model_len: int
    vocab_size: int


@dataclass(frozen=True)
class Case:
    """One kind of request.

    Attributes:
        requests: those that are sent.
        at_once: connections at a time.
        hold_s: None waits for answers; else a connection stays open for so many seconds after its
            bytes are sent, and nobody reads.
        drip: bytes sent every tenth of a second while it is held.
        open_files: `ulimit -n` of the server; None is that of the run.
        leaves_s: seconds after which a client closes its connection; None waits for the answer.
        ends_sending: a client closes its sending side after the request.
        flags: of the server.
        patience: times that of other kinds, where the worst comes only with the answer.
    """

    requests: Callable[[Facts], Iterable[HostileRequest]]
    at_once: int = 1
    hold_s: float | None = None
    drip: bytes = b""
    open_files: int | None = None
    leaves_s: float | None = None
    ends_sending: bool = False
    flags: tuple[str, ...] = ()
    patience: float = 1.0


def post(path: str, body: dict[str, Any] | bytes, *headers: tuple[bytes, bytes]) -> HostileRequest:
    """A POST of a body, given as an object or as its bytes."""
    if isinstance(body, dict):
        body = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    return HostileRequest("POST", path, (JSON, *headers), body)


def one(path: str, make: Callable[[Facts], dict[str, Any] | bytes], copies: int = 1) -> Any:
    """The same request so many times."""
    return lambda facts: [post(path, make(facts))] * copies
