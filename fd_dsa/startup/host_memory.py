"""Free memory of the host, within the limits of the process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fd_dsa.errors import ConfigError

_UNLIMITED = 1 << 60


def available_memory_bytes(
    proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the bytes that this process may still allocate without swapping.

    The minimum of three limits counts: MemAvailable of the system, the address space that
    `ulimit -v` leaves, and the rest of each control group of the process, version 1 or 2. File
    pages that the kernel can drop do not count as used.

    Raises:
        ConfigError: /proc/meminfo has no MemAvailable.
    """
    meminfo = _read_text(proc / "meminfo")
    available = _keyed_number(meminfo, "MemAvailable:")
    if available is None:
        raise ConfigError(
            f"{proc / 'meminfo'}: found no MemAvailable; fd_dsa needs Linux 3.14 or later"
        )
    rooms = [_group_room(group) for group in _memory_groups(proc, cgroup)]
    return min([available * 1024, _address_room(proc / "self"), *rooms])


def _memory_groups(proc: Path, cgroup: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that limit this process, the innermost first."""
    for line in _read_text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # version 1 has a tree for each controller, version 2 one for all
        root = cgroup / "memory" if controllers else cgroup
        group = PurePosixPath(path)
        for part in (group, *group.parents):
            yield root / part.relative_to("/")


def _address_room(process: Path) -> int:
    """Return the bytes that `ulimit -v` leaves a process, a very large number without a limit."""
    limit = _keyed_number(_read_text(process / "limits"), "Max address space")
    size = _keyed_number(_read_text(process / "status"), "VmSize:")
    return _UNLIMITED if limit is None or size is None else max(limit - size * 1024, 0)


def _group_room(folder: Path) -> int:
    """Return the bytes that a control group leaves, a very large number without a limit."""
    for limit_name, usage_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, usage = _read_text(folder / limit_name), _read_text(folder / usage_name)
        if not limit.strip().isdigit() or not usage.strip().isdigit():
            continue
        stat = _read_text(folder / "memory.stat")
        droppable = sum(
            _keyed_number(stat, f"{prefix}{kind}") or 0 for kind in ("inactive_file", "active_file")
        )
        return max(int(limit) - max(int(usage) - droppable, 0), 0)
    return _UNLIMITED


def _keyed_number(text: str, key: str) -> int | None:
    """Return the number after a key at the start of a line, or None."""
    found = re.search(rf"^{re.escape(key)}\s+(\d+)\b", text, re.MULTILINE)
    return int(found[1]) if found else None


def _read_text(path: Path) -> str:
    """Read a small file of the system, or return "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
