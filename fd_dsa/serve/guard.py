"""Checks before every route: host, key, availability, body, concurrency.

Every path needs the key, except a few that only report on the server, so a new route is guarded by
default. (vLLM's key guards only some prefixes.)

A web page may send requests to the address that its own name resolves to. An attacker who changes
that address to 127.0.0.1 (DNS rebinding) would reach a server meant for programs of this machine
only. The Host header still has the attacker's name, so it is checked.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Sequence
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fd_dsa.serve.body import check_length, receive_body
from fd_dsa.serve.errors import ApiError, is_anthropic, show
from fd_dsa.serve.listener import PROBE_PATHS
from fd_dsa.serve.pages import PAGE_PATHS, STATIC_PREFIX
from fd_dsa.serve.state import ServerState
from fd_dsa.serve.workers import Turns

OPEN_PATHS = PAGE_PATHS | PROBE_PATHS | {"/openapi.json", "/version", "/metrics"}
"""Paths without a key. They compute no tokens and show no data of requests."""
ANY_HOST = "*"
# of all paths together, for `OPTIONS *`
_METHODS = "GET, HEAD, POST, OPTIONS"
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/\s]+)(:[0-9]*)?")


def host_rule(host: str, bound: str, allowed: Sequence[str]) -> Callable[[str], None] | None:
    """Return the check of the Host header, or None if every Host is accepted.

    On a loopback address only the names below and loopback addresses pass. On other addresses every
    IP address passes too, because DNS cannot redirect an IP address, and probes of an orchestrator
    use it.

    Args:
        host: the --host of the command line. localhost and loopback addresses are always allowed.
        bound: the address that `host` resolved to.
        allowed: the values of --allowed-host.
    """
    names = {name.strip("[]").lower() for name in (host, "localhost", *allowed)}
    address = _address(bound)
    is_loopback = address is not None and address.is_loopback
    if ANY_HOST in names or not (is_loopback or allowed):
        return None

    def check(value: str) -> None:
        match = _HOST.fullmatch(value)
        name = match[1].strip("[]").lower().rstrip(".") if match else ""
        requested = _address(name)
        is_allowed = requested is not None and (not is_loopback or requested.is_loopback)
        if name not in names and not is_allowed:
            raise ApiError(
                403,
                f"Host: got {show(value)}, which is no name of this server; allowed are localhost "
                "and those of --host and --allowed-host",
                code="host_not_allowed",
            )

    return check


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


class GuardMiddleware:
    """Refuses invalid requests before reading their bodies, and long or slow bodies.

    A POST counts as accepted from the end of its body to the end of its answer, so that slow
    senders take no slot. Routes read the body from `request.state.body`, and call
    `ServerState.hold` for several outputs.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._turns = Turns()
        self._key_digests = [sha256(key.encode()).digest() for key in state.options.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] not in PROBE_PATHS:
            await self._turns.wait()
        with contextlib.ExitStack() as held:
            try:
                if self._check_head(scope):
                    scope["state"]["body"] = [await receive_body(self._state, receive, held)]
                    self._state.num_accepted += 1
                    held.callback(self._finish)
                    self._state.check_available(is_accepted=True)
                    held.callback(self._state.release, scope["state"])
                    self._state.hold(scope["state"], 1)
                answer = None if scope["path"] != "*" else Response(headers={"Allow": _METHODS})
            except ApiError as error:
                answer = error.response(scope["path"])
            if answer is not None:
                await answer(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _finish(self) -> None:
        self._state.num_accepted -= 1

    def _check_head(self, scope: Scope) -> bool:
        """Check the head of a request. Returns True if a body follows that must be read."""
        headers, options = Headers(scope=scope), self._state.options
        host = headers.get("host")
        # HTTP/1.1 requires the header; clients of older versions are no browsers
        if options.hosts is not None and host is not None:
            options.hosts(host)
        if scope["path"] in OPEN_PATHS or scope["path"].startswith(STATIC_PREFIX):
            return False
        self._check_key(headers, scope["path"])
        length = headers.get("content-length", "")
        check_length(int(length) if length.isdigit() else 0, options)
        if scope["method"] != "POST":
            return False
        encoding = headers.get("content-encoding", "")
        # the size of a compressed body does not bound its unpacked size
        if encoding.strip().lower() not in ("", "identity"):
            raise ApiError(
                415,
                f"Content-Encoding: got {show(encoding)}, allowed: none; send the body as it is",
            )
        self._state.check_available()
        return True

    def _check_key(self, headers: Headers, path: str) -> None:
        if not self._key_digests:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        keys = [key.strip()] if scheme.lower() == "bearer" else []
        send = "Authorization: Bearer KEY"
        if is_anthropic(path):
            keys.append(headers.get("x-api-key", "").strip())
            send = "x-api-key: KEY, or Authorization: Bearer KEY"
        # compare all keys, so that the time does not depend on which one matches
        if any([self._is_key(key) for key in keys]):
            return
        is_sent = key or any(keys)
        no_key = "no API key came with the request"
        what = "the API key is not valid for this server" if is_sent else no_key
        raise ApiError(
            401,
            f"{what}; send the header {send}",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_key(self, key: str) -> bool:
        # starlette decodes headers as Latin-1, which gives the sent bytes back
        digest = sha256(key.encode("latin-1")).digest()
        return any([hmac.compare_digest(digest, known) for known in self._key_digests])
