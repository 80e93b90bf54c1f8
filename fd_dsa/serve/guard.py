"""Checks before every route: host, key, availability, the body, concurrency.

All paths ask for the key, except a few that only report on the server. So a route that is added
later is guarded by default (vLLM's key guards some prefixes, and lets others compute).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fd_dsa.serve.body import BodyReader, too_long
from fd_dsa.serve.errors import ApiError, show
from fd_dsa.serve.pages import CHAT_PATHS
from fd_dsa.serve.state import ServerState
from fd_dsa.serve.status import PROBE_PATHS

OPEN_PATHS = CHAT_PATHS | PROBE_PATHS | {"/docs", "/openapi.json", "/version", "/metrics"}
"""Paths that need no key: they compute nothing and show nothing of requests."""


class GuardMiddleware:
    """Refuses requests before their bodies are read, and bodies that are too much or too slow.

    A POST is counted by `ConcurrencyLimit` from the end of its body until its answer has been sent.
    Routes find its body in `request.state.body`, and its ticket in `request.state.ticket`, which
    they extend when they ask for several outputs.

    Args:
        app: the next application.
        state: of the server.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._bodies = BodyReader(state.options)
        self._key_digests = [_digest(key.encode()) for key in state.options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with contextlib.ExitStack() as held:
            try:
                if self._check_head(scope):
                    await self._admit(scope, receive, held)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _check_head(self, scope: Scope) -> bool:
        """Refuse a request by its head; True for one that computes, whose body comes next."""
        headers = Headers(scope=scope)
        rule, host = self._state.options.hosts, headers.get("host")
        # HTTP/1.1 has the header; older clients, which are no browsers, may not
        if rule is not None and host is not None:
            rule.check(host)
        if scope["path"] in OPEN_PATHS:
            return False
        self._check_key(headers.get("authorization", ""))
        self._check_length(headers.get("content-length", ""))
        if scope["method"] != "POST":
            return False
        _check_encoding(headers.get("content-encoding", ""))
        self._state.check_available()
        return True

    async def _admit(self, scope: Scope, receive: Receive, held: contextlib.ExitStack) -> None:
        """Receive the body, then count the request; a slow client takes nobody's place."""
        scope["state"]["body"] = [await self._bodies.read(receive, held)]
        self._state.check_available()
        ticket = scope["state"]["ticket"] = self._state.concurrency.admit()
        held.callback(ticket.release)

    def _check_key(self, authorization: str) -> None:
        """401 unless the request brings one of the keys."""
        if not self._key_digests:
            return
        scheme, _, key = authorization.partition(" ")
        # starlette reads headers as Latin-1; the key is the bytes that came
        known = _matches(self._key_digests, key.strip().encode("latin-1"))
        if scheme.lower() == "bearer" and known:
            return
        what = "the API key is none of this server's" if key else "no API key came with the request"
        raise ApiError(
            401,
            f"{what}; send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _check_length(self, content_length: str) -> None:
        """413 for a body that says at once that it is too long."""
        if content_length.isdigit() and int(content_length) > self._state.options.max_body_bytes:
            raise too_long(self._state.options)


def _check_encoding(content_encoding: str) -> None:
    """415 for a compressed body; its length says nothing of what it would take unpacked."""
    if content_encoding.strip().lower() not in ("", "identity"):
        raise ApiError(
            415,
            f"Content-Encoding: got {show(content_encoding)}, allowed: none; send the body as it "
            "is",
        )


def _matches(digests: Sequence[bytes], key: bytes) -> bool:
    """Whether a key has one of the digests; the time it takes does not depend on which."""
    digest = _digest(key)
    matches = [hmac.compare_digest(digest, known) for known in digests]
    return any(matches)


def _digest(key: bytes) -> bytes:
    """A key as bytes of one length."""
    return hashlib.sha256(key).digest()
