"""Files that a user gives to a command."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fd_dsa.errors import ConfigError

MAX_BYTES = 200_000_000
"""Maximum size of a file with a request, prompt or response in each line.

It is OpenAI's limit for the input of a batch.
"""
_CHUNK_BYTES = 1 << 20


def read_bounded(path: Path | str, most: int, hint: str = "split it") -> bytes:
    """Return the content of a file, which may be a pipe or a device without an end.

    Args:
        hint: what to do about a file that is too long.

    Raises:
        ConfigError: it has more than `most` bytes, or is a pipe that nobody writes.
        OSError: it cannot be read.
    """
    parts, num_bytes = [], 0
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        # a pipe and a device have no size, so what is read counts too
        is_long = stat.S_ISREG(status.st_mode) and status.st_size > most
        if stat.S_ISFIFO(status.st_mode):
            first = file.read(1)
            if first == b"":
                raise ConfigError(
                    f"{path}: is a pipe without a writer; start the writer first, or give a file"
                )
            parts, num_bytes = [first or b""], len(first or b"")
        os.set_blocking(file.fileno(), True)
        # usually one read, whose bytes are not copied
        chunk = max(status.st_size + 1, _CHUNK_BYTES)
        while not is_long and (part := file.read(min(chunk, most + 1 - num_bytes))):
            parts.append(part)
            num_bytes += len(part)
            is_long = num_bytes > most
    if is_long:
        raise ConfigError(f"{path}: has more bytes, allowed: at most {most}; {hint}")
    return b"".join(parts)


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without a wait for the writer of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)
