"""Files for the results of long work."""

from __future__ import annotations

import os
from pathlib import Path

from fd_dsa.errors import ConfigError


def result_file(flag: str, name: str, source: str | None = None) -> Path:
    """Check a result file before the work, so that a wrong name loses no results.

    Args:
        flag: flag that has the name, for messages.
        source: file that the command reads, which the results must not replace; None = none.

    Returns:
        The target of symbolic links, so that writing keeps the links.

    Raises:
        ConfigError: the name is empty, or the file cannot be written. The message has flag, name
            and rule.
    """
    if not name:
        raise ConfigError(f"{flag}: got '', allowed: the name of a file")
    if is_special(Path(name)):
        # the target of /dev/stdout may have no name
        return Path(name)
    path = Path(os.path.realpath(name))
    if path.is_dir():
        raise ConfigError(f"{flag}: {name} is a folder; give a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag}: {name}: the folder does not exist; make it first")
    for one in (path, path.parent):
        if one.exists() and not os.access(one, os.W_OK):
            raise ConfigError(f"{flag}: {one} cannot be written; give another file")
    if source is not None and path.exists() and os.path.samefile(path, source):
        raise ConfigError(f"{flag}: {name} is also the input; give another file")
    return path


def is_special(path: Path) -> bool:
    """Return True for a pipe or a device, which is written in place."""
    return path.exists() and not path.is_file() and not path.is_dir()
