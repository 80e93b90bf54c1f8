"""Access to an OpenAI-compatible server: base URL, models, streams, error messages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from fd_dsa.environment import variable
from fd_dsa.errors import ConfigError, RemoteError, shorten

CONNECT_TIMEOUT_S = 10.0
_SHOWN_CHARS = 200
SERVER_FACTS = (
    "engine",
    "version",
    "commit",
    "device",
    "device_name",
    "dtype",
    "kv_cache_dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "target_inter_token_latency_ms",
    "block_size",
    "enable_prefix_caching",
    "batch_invariant",
    "sampling",
    "providers",
)
"""Fields of /version and /server_info that are kept."""


@dataclass(frozen=True)
class ServerInfo:
    """A server's description of itself.

    Attributes:
        max_model_len: maximum length of prompt plus answer, tokens. None if unknown.
        facts: the fields of `SERVER_FACTS`, each None if unknown.
    """

    model: str
    max_model_len: int | None
    facts: dict[str, Any] = field(default_factory=dict)


def normal_base_url(text: str) -> str:
    """Return the base URL without a trailing slash, with `/v1` if it has no path.

    Raises:
        ConfigError: the text is not an http or https URL.
    """
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        # the encodings of httpx and of the system
        httpx.URL(text).host.encode("idna")
    except (ValueError, httpx.InvalidURL):
        good = False
    if not good or parts.query or parts.fragment:
        raise ConfigError(
            f"--base-url: got {shorten(shown_url(text))}; allowed is a URL such as "
            "http://127.0.0.1:8000/v1"
        )
    return text.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def shown_url(url: str) -> str:
    """Return a URL without user and password, for messages and files."""
    return re.sub("//[^/]*@", "//", url, count=1)


def http_options(base_url: str, timeout_s: float) -> dict[str, Any]:
    """Return the arguments of httpx's clients for this server: key, timeouts, proxies.

    Raises:
        ConfigError: a header cannot carry the key.
    """
    key = variable("OPENAI_API_KEY")
    if not key.isascii():
        raise ConfigError("OPENAI_API_KEY: has characters beyond ASCII; allowed is a key in ASCII")
    if not key.isprintable():
        # the error of httpx would show the key
        raise ConfigError(
            "OPENAI_API_KEY: has a line end or another control character; allowed is a key "
            "without them"
        )
    host = urlsplit(base_url).hostname or ""
    return {
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
        # a proxy of the environment cannot reach a server on this machine
        "trust_env": not (host in ("localhost", "::1") or host.startswith("127.")),
    }


def examine_server(base_url: str, model: str | None, flag: str = "--model") -> ServerInfo:
    """Return the server's description of itself.

    Args:
        flag: the flag that names the model, the first word of an error about it.

    Raises:
        ConfigError: the server cannot be reached, is not OpenAI-compatible, refuses the key, or
            does not have the model. The last error lists its models.
    """
    options = http_options(base_url, CONNECT_TIMEOUT_S)
    try:
        client = httpx.Client(**options)
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) and "SOCKS" not in str(error):
            raise
        raise ConfigError(
            f"--base-url: {shown_url(base_url)}: the proxy of HTTP_PROXY, HTTPS_PROXY or "
            f"ALL_PROXY cannot be used ({error}); add the host to NO_PROXY"
        ) from error
    with client as http:
        models = _models(http, base_url, model)
        entry = _choose(models, base_url, model, flag)
        facts = _facts(http, base_url, entry)
    length = facts["max_model_len"]
    return ServerInfo(str(entry["id"]), length if isinstance(length, int) else None, facts)


def _models(http: httpx.Client, base_url: str, model: str | None) -> list[dict[str, Any]]:
    """Return the served models, or the requested one if the server has no such list."""
    url = f"{base_url}/models"
    try:
        reply = http.get(url)
    except httpx.HTTPError as error:
        raise ConfigError(
            f"--base-url: {shown_url(base_url)} cannot be reached "
            f"({transport_reason(error)}); start a server there, or leave the flag out and one is "
            "started for the run"
        ) from error
    if reply.status_code in (401, 403):
        raise ConfigError(key_refused(base_url, reply.status_code))
    if reply.status_code in (404, 405) and model is not None:
        return [{"id": model}]
    try:
        models = [dict(entry) for entry in reply.json()["data"] if entry["id"]]
    except (ValueError, KeyError, TypeError):
        models = []
    if reply.status_code != 200 or not models:
        raise ConfigError(
            f"--base-url: {shown_url(url)} answers with status {reply.status_code} and no list of "
            "models; give the base URL of an OpenAI-compatible server, which mostly ends in /v1"
        )
    return models


def _choose(
    models: list[dict[str, object]], base_url: str, model: str | None, flag: str
) -> Mapping[str, Any]:
    if model is None and (len(models) == 1 or models[0].get("owned_by") == "fd_dsa"):
        # the names of our server all belong to one model
        return models[0]
    for entry in models:
        if entry["id"] == model:
            return entry
    names = ", ".join(str(entry["id"]) for entry in models)
    got = "name one of several" if model is None else f"got {shorten(model)}"
    raise ConfigError(f"{flag}: {got}; the server at {shown_url(base_url)} has {names}")


def _facts(http: httpx.Client, base_url: str, entry: Mapping[str, object]) -> dict[str, Any]:
    facts = {"engine": entry.get("owned_by"), "max_model_len": entry.get("max_model_len")}
    for path in ("/version", "/server_info"):
        with contextlib.suppress(httpx.HTTPError, ValueError):
            reply = http.get(base_url.removesuffix("/v1") + path)
            if reply.status_code == 200 and isinstance(page := reply.json(), dict):
                facts.update({k: v for k, v in page.items() if v is not None})
    return {name: facts.get(name) for name in SERVER_FACTS}


def error_message(reply: httpx.Response) -> str:
    """Return a server's error message in one line."""
    try:
        data = reply.json()
        return _error_text(data.get("error", data.get("detail", data)))
    except (ValueError, AttributeError):
        return one_line(reply.text)


def incomplete(body: object) -> str:
    """Return why an answer, or a chunk of a stream, is no whole answer, or "" if nothing says so.

    An answer of a server that shuts down ends with `abort`, that of a failed request with `error`.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    for choice in choices if isinstance(choices, list) else ():
        reason = choice.get("finish_reason") if isinstance(choice, dict) else None
        if reason in ("abort", "error"):
            return f"finish_reason {reason}: the answer is incomplete"
    return ""


def _error_text(error: object) -> str:
    """Return the message of an error object, or the error itself."""
    return one_line(str(error.get("message", error) if isinstance(error, dict) else error))


def read_event(line: str) -> dict[str, Any] | None:
    """Return the chunk in a line of a stream, or None for other lines and `[DONE]`.

    Raises:
        RemoteError: the line is an error of the server, or not a JSON object.
    """
    if not line.startswith("data:"):
        return None
    text = line.removeprefix("data:").strip()
    if text == "[DONE]":
        return None
    try:
        chunk = json.loads(text)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise RemoteError(f"the stream has a line that is no JSON object: {one_line(text)}")
    if "error" in chunk:
        raise RemoteError(_error_text(chunk["error"]))
    return chunk


def one_line(text: str) -> str:
    """Return a text as one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 3] + "..."


def transport_reason(error: httpx.HTTPError) -> str:
    """Return the reason for a missing reply, in words."""
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, httpx.TimeoutException):
        return "no reply in time"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            # its number is none of the system
            reason = getattr(cause, "verify_message", "") or (cause.reason or "").replace("_", " ")
            return f"TLS: {reason.lower() or 'no connection'}"
        if isinstance(cause, OSError) and cause.strerror:
            # asyncio's text has the address too; an unknown name has a negative number
            number = cause.errno or 0
            return (os.strerror(number) if number > 0 else cause.strerror).lower()
        cause = cause.__cause__ or cause.__context__
    return one_line(str(error)) or type(error).__name__


def key_refused(base_url: str, status: int) -> str:
    """Return the error message for a missing or wrong key."""
    state = "is not accepted" if variable("OPENAI_API_KEY") else "is not set"
    return f"{shown_url(base_url)} answers with status {status}: OPENAI_API_KEY {state}"
