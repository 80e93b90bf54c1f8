"""Checks before every route: host, key, availability, the body, concurrency.

All paths ask for the key, except a few that only report on the server. So a route that is added
later is guarded by default (vLLM's key guards some prefixes, and lets others compute).

A browser lets a page ask the address that the page's name resolves to. An attacker who changes that
address to 127.0.0.1 (DNS rebinding) would reach a server that only programs of this machine should
reach; the Host header is still the attacker's name.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Sequence
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fd_dsa.serve.body import check_length, receive_body
from fd_dsa.serve.errors import ApiError, is_anthropic, show
from fd_dsa.serve.pages import PAGE_PATHS, STATIC_PREFIX
from fd_dsa.serve.state import ServerState
from fd_dsa.serve.status import PROBE_PATHS
from fd_dsa.serve.workers import Turns

OPEN_PATHS = PAGE_PATHS | PROBE_PATHS | {"/openapi.json", "/version", "/metrics"}
"""Paths that need no key: they compute nothing and show nothing of requests."""
ANY_HOST = "*"
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/\s]+)(:[0-9]*)?")


def host_rule(host: str, bound: str, allowed: Sequence[str]) -> Callable[[str], None] | None:
    """What refuses the Host header of a request; None where every Host is served.

    On other addresses than loopback it lets every IP address through, as nobody can let one resolve
    to another; probes of an orchestrator come with the server's.

    Args:
        host: the --host of the command line; localhost and loopback addresses are always allowed.
        bound: the address that it resolved to.
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
        asked = _address(name)
        is_allowed = asked is not None and (not is_loopback or asked.is_loopback)
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
    """Refuses requests before their bodies are read, and bodies that are too long or too slow.

    A POST is counted from the end of its body until its answer has been sent: a client that
    sends slowly takes no place from others. Routes find its body in `request.state.body`; they
    call `ServerState.hold` when they ask for several outputs.
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
            except ApiError as error:
                await error.response(scope["path"])(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _finish(self) -> None:
        self._state.num_accepted -= 1

    def _check_head(self, scope: Scope) -> bool:
        """Refuse a request by its head; True for one that computes, whose body comes next."""
        headers, options = Headers(scope=scope), self._state.options
        host = headers.get("host")
        # HTTP/1.1 has the header; older clients, which are no browsers, may not
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
        # the length of a compressed body says nothing of what it would take unpacked
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
        # all of them: the time it takes does not depend on which is the right one
        if any([self._is_key(key) for key in keys]):
            return
        is_sent = key or any(keys)
        no_key = "no API key came with the request"
        what = "the API key is none of this server's" if is_sent else no_key
        raise ApiError(
            401,
            f"{what}; send the header {send}",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_key(self, key: str) -> bool:
        # starlette reads headers as Latin-1; the key is the bytes that came
        digest = sha256(key.encode("latin-1")).digest()
        return any([hmac.compare_digest(digest, known) for known in self._key_digests])
