"""Which process listens on a TCP port, as far as this user may see it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"


def describe_port_owner(port: int, proc: Path = Path("/proc")) -> str:
    """The process that listens on a port, such as `process 123 (python)`; "" if not to be seen.

    Args:
        port: TCP port, version 4 or 6 of IP, on any address.
        proc: where the file system of processes is mounted.
    """
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port, proc)}
    if not sockets:
        return ""
    for folder in proc.glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in sockets for link in (folder / "fd").iterdir()):
                name = (folder / "comm").read_text("utf-8", "replace").strip()
                return f"process {folder.name} ({name})"
        except OSError:
            # another user's process, or one that has ended meanwhile
            continue
    return ""


def _listening_inodes(port: int, proc: Path) -> Iterator[str]:
    """Inodes of the sockets that listen on the port."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text("ascii", "replace").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[3] == _LISTEN and int(words[1].rpartition(":")[2], 16) == port:
                yield words[9]
