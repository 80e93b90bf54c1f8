"""What stands before every route: key, availability, concurrency, size of the body.

All paths but a few that only tell how the server is ask for the key, so a route that is added
later is guarded without a thought (vLLM's key guards some prefixes, and lets others compute).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fd_dsa.serve.body_scan import BodyScan
from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.page import PAGE_PATHS
from fd_dsa.serve.state import ServerState

OPEN_PATHS = PAGE_PATHS | {
    *("/docs", "/openapi.json", "/version", "/metrics"),
    *("/health", "/livez", "/readyz", "/startupz"),
}
"""Paths that need no key: they compute nothing and tell nothing of requests."""


class GuardMiddleware:
    """Refuses requests before their bodies are read, and bodies that are too much or too slow.

    A POST is counted by `ConcurrencyLimit` until its answer has been sent; routes find its ticket
    in `request.state.ticket` and extend it when they ask for several outputs.

    Args:
        app: what comes behind.
        state: of the server.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._key_digests = [_digest(key.encode()) for key in state.options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_key(headers.get("authorization", ""))
            self._check_length(headers.get("content-length", ""))
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            self._state.check_available()
            ticket = self._state.concurrency.admit()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        scope["state"]["ticket"] = ticket
        try:
            await self._app(scope, self._limited(receive), send)
        finally:
            ticket.release()

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
            raise ApiError(413, self._too_long(), headers={"Connection": "close"})

    def _too_long(self) -> str:
        """What is wrong with a long body."""
        limit = self._state.options.max_body_bytes
        return f"the body is longer than {limit} bytes, the --max-body-size of this server"

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, which refuses a body past a limit or one that does not come to its end."""
        options = self._state.options
        loop = asyncio.get_running_loop()
        deadline = loop.time() + options.body_timeout_s
        scan = BodyScan(options.max_body_values)
        num_bytes = 0
        is_complete = False

        async def next_part() -> Message:
            nonlocal num_bytes, is_complete
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not come within {options.body_timeout_s:g} s; send it at once",
                    headers={"Connection": "close"},
                ) from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > options.max_body_bytes:
                raise ApiError(413, self._too_long(), headers={"Connection": "close"})
            is_complete = not message.get("more_body", False)
            return message

        async def limited() -> Message:
            if is_complete:
                return await receive()
            message = await next_part()
            try:
                scan.feed(message.get("body", b""))
            except ApiError:
                # most clients read an answer only when they have sent everything
                while not is_complete:
                    await next_part()
                raise
            return message

        return limited


def _matches(digests: Sequence[bytes], key: bytes) -> bool:
    """Whether a key has one of the digests; the time it takes does not depend on which."""
    digest = _digest(key)
    found = [hmac.compare_digest(digest, known) for known in digests]
    return any(found)


def _digest(key: bytes) -> bytes:
    """A key as bytes of one length."""
    return hashlib.sha256(key).digest()
