"""Files that a user gives to a command."""

from __future__ import annotations

from pathlib import Path

from fd_dsa.errors import ConfigError

MAX_BYTES = 200_000_000
"""Maximum size of a file with a request, prompt or response in each line.

It is OpenAI's limit for the input of a batch.
"""


def read_bounded(path: Path | str, most: int) -> bytes:
    """Return the content of a file, which may be a pipe or a device without an end.

    Raises:
        ConfigError: it has more than `most` bytes.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        # not its size, which a pipe or a device lacks
        data = file.read(most + 1)
    if len(data) > most:
        raise ConfigError(f"{path}: has more bytes, allowed: at most {most}; split it")
    return data
