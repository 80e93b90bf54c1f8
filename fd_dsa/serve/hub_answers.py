"""Checks of a hub's answers before huggingface_hub turns them into paths.

huggingface_hub names the files of its cache by the hashes that a hub sends, and folders by the
commit. A malicious hub could name files outside the cache, list endless pages, or stall. The checks
are hooks of the HTTP client that all calls of the library share.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from huggingface_hub import get_session, set_client_factory
from huggingface_hub.constants import ENDPOINT

from fd_dsa.errors import ConfigError

if TYPE_CHECKING:
    import httpx

# httpx or httpx2, by the version of huggingface_hub
_httpx: Any = import_module(type(get_session()).__module__.partition(".")[0])

MAX_ANSWER_BYTES = 64 << 20
"""Maximum size of an answer that is not a file, bytes.

A listing of 1,000 files has 0.4 MB.
"""
MAX_ANSWER_S = 60.0
"""Time limit for the body of such an answer, seconds."""
MAX_LISTINGS = 100
"""Maximum number of listing pages in one download. The hub's pages have 1,000 files."""
MAX_SILENCE_S = 10.0
"""Time limit for a connection or for the next bytes, seconds."""

_COMMIT = re.compile("[0-9a-f]{40}")
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_HASH_FIELDS = ("oid", "sha256", "blobId", "xetHash")


def check_hub_answers() -> None:
    """Install the checks for all later calls of huggingface_hub in this process.

    The calls then raise ConfigError for an invalid hash or commit and for a path outside the
    model's folder. They also raise it for answers over the bounds of this module.
    """
    first = get_session()
    listings = itertools.count(1)

    def check(response: httpx.Response) -> None:
        _check_response(response, listings)

    hooks = {"request": [*first.event_hooks["request"], _limit_silence], "response": [check]}
    set_client_factory(
        lambda: _httpx.Client(event_hooks=hooks, follow_redirects=True, timeout=None)
    )


def _limit_silence(request: httpx.Request) -> None:
    """Set the timeouts that a call of the library does not set."""
    given = request.extensions.get("timeout") or {}
    names = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {
        name: MAX_SILENCE_S if given.get(name) is None else given[name] for name in names
    }


def _check_response(response: httpx.Response, listings: Iterator[int]) -> None:
    """Check the head of an answer, and the body of a listing."""
    request = response.request
    if request.method == "HEAD":
        _check_head(response.headers)
    if request.method == "HEAD" or "/api/" in request.url.path:
        response.stream = _BoundedStream(response.stream)
    if not request.url.path.startswith(_api_path()) or response.status_code != 200:
        return
    if next(listings) > MAX_LISTINGS:
        raise ConfigError(
            f"--download: the hub lists files on more than {MAX_LISTINGS} pages; HF_ENDPOINT must "
            "be a hub of models"
        )
    response.read()
    try:
        listing = json.loads(response.content)
    except (ValueError, RecursionError):
        # the library reports invalid JSON itself
        return
    _check_listing(listing)


def _api_path() -> str:
    """Return the path of the hub's model API, which extends the path of HF_ENDPOINT."""
    return f"{urlsplit(ENDPOINT).path.rstrip('/')}/api/models/"


def _check_head(headers: Mapping[str, str]) -> None:
    """Check the hash and the commit that name a file and its folder in the cache."""
    etag = headers.get("X-Linked-Etag") or headers.get("ETag")
    if etag is not None:
        _check_name("ETag", etag.removeprefix("W/").strip('"'), _HASH, "a SHA-1 or SHA-256 in hex")
    commit = headers.get("X-Repo-Commit")
    if commit is not None:
        _check_name("X-Repo-Commit", commit, _COMMIT, "a commit, 40 hex digits")


def _check_listing(listing: object) -> None:
    """Check commit, hashes and paths in a model description or a file listing."""
    if isinstance(listing, dict):
        if listing.get("sha") is not None:
            _check_name("sha", listing["sha"], _COMMIT, "a commit, 40 hex digits")
        listing = listing.get("siblings")
    for entry in listing if isinstance(listing, list) else ():
        if not isinstance(entry, dict):
            continue
        lfs = entry.get("lfs")
        for holder in (entry, lfs if isinstance(lfs, dict) else {}):
            for field in _HASH_FIELDS:
                if holder.get(field) is not None:
                    _check_name(field, holder[field], _HASH, "a SHA-1 or SHA-256 in hex")
        for field in ("path", "rfilename"):
            if entry.get(field) is not None:
                _check_path(field, entry[field])


def _check_name(field: str, value: object, form: re.Pattern[str], rule: str) -> None:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ConfigError(f"--download: the hub's {field}: got {value!r:.80}; must be {rule}")


def _check_path(field: str, value: object) -> None:
    path = PurePosixPath(value) if isinstance(value, str) else None
    if path is None or path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise ConfigError(
            f"--download: the hub's {field}: got {value!r:.80}; must be a path inside the model"
        )


class _BoundedStream(_httpx.SyncByteStream):  # type: ignore[misc]
    """The body of an answer, bounded in size and time."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        deadline = time.monotonic() + MAX_ANSWER_S
        num_bytes = 0
        for chunk in self._stream:
            num_bytes += len(chunk)
            if num_bytes > MAX_ANSWER_BYTES or time.monotonic() > deadline:
                raise ConfigError(
                    f"--download: an answer of the hub has more than {MAX_ANSWER_BYTES} bytes or "
                    f"takes more than {MAX_ANSWER_S:g} s; HF_ENDPOINT must be a hub of models"
                )
            yield chunk

    def close(self) -> None:
        self._stream.close()
