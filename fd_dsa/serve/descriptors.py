"""File descriptors: how many connections the process can hold, and what it keeps for the rest."""

from __future__ import annotations

import contextlib
import os
import resource
import sys

from fd_dsa.errors import ConfigError

DEFAULT_MAX_CONNECTIONS = 4096
PROBE_CONNECTIONS = 8
"""Connections beyond the limit, on which probes are still answered."""
# files of the model, the engine's pipes, compilers, and what is accepted in one turn of the loop
_KEPT_DESCRIPTORS = 40


def connection_limit(asked: int | None) -> int:
    """Raise RLIMIT_NOFILE to its hard limit and share out the descriptors.

    Args:
        asked: the --max-connections of the command line; None without one.

    Returns:
        `asked`, or `DEFAULT_MAX_CONNECTIONS`, fewer where the process may not open so many files.

    Raises:
        ConfigError: the process may not open as many files as `asked` needs, or hardly any.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # refused where the hard limit is above fs.nr_open
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        files = sys.maxsize
    kept = len(os.listdir("/proc/self/fd")) + _KEPT_DESCRIPTORS + PROBE_CONNECTIONS
    if files <= kept:
        raise ConfigError(
            f"ulimit -n: the process may open {files} files, the server keeps {kept} of them for "
            "other things than connections; raise the limit"
        )
    if asked is not None and asked > files - kept:
        raise ConfigError(
            f"--max-connections: got {asked}, allowed: at most {files - kept}, as the process may "
            f"open {files} files and keeps {kept} of them for other things; raise ulimit -n"
        )
    return asked or min(DEFAULT_MAX_CONNECTIONS, files - kept)
