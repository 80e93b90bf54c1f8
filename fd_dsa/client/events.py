"""The JSON objects of a stream of server-sent events."""

from __future__ import annotations

import json
from typing import Any

from fd_dsa.client.remote import one_line
from fd_dsa.errors import RemoteError

_DATA = "data:"


def read_event(line: str) -> dict[str, Any] | None:
    """The chunk in a line of a stream; None for lines that hold none, `[DONE]` among them.

    Raises:
        RemoteError: the line is an error of the server, or no JSON object.
    """
    if not line.startswith(_DATA):
        return None
    text = line[len(_DATA) :].strip()
    if text == "[DONE]":
        return None
    try:
        chunk = json.loads(text)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise RemoteError(f"the stream has a line that is no JSON object: {one_line(text)}")
    if "error" in chunk:
        error = chunk["error"]
        said = error.get("message", error) if isinstance(error, dict) else error
        raise RemoteError(one_line(str(said)))
    return chunk
