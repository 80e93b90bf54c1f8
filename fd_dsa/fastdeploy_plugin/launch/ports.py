"""The ports of FastDeploy's server: its HTTP port, and those of its own processes."""

from __future__ import annotations

import socket

from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.launch.flags import PassedFlags

_LAST_PORT = 65535
_QUEUES = ("--engine-worker-queue-port", "--cache-queue-port")


def choose_ports(
    host: str, port: int, port_is_given: bool, passed: PassedFlags, num_queues: int
) -> dict[str, str]:
    """Free consecutive ports for all that the user left open.

    One for HTTP, one for metrics, and a queue of workers and one of caches for each data parallel
    rank of this machine: four in all for one rank. FastDeploy's own defaults differ from version
    to version, and two servers on one machine must not share them.

    Args:
        host: interface of the HTTP port.
        port: our `--port`, 0 for any.
        port_is_given: the user gave it, so it stays; else others are tried above it.
        passed: flags after `--`, whose ports stay.
        num_queues: data parallel ranks on this machine.

    Returns:
        FastDeploy's flags for the ports that the user did not give it, and their values.

    Raises:
        ConfigError: the interface is none of this machine's; no such ports are free; on several
            machines, where all must have the same ports, those above the HTTP port are taken.
    """
    try:
        any_port = _any_port(host)
    except OSError as error:
        raise ConfigError(
            f"--host: got {host!r}, which is no address of this machine ({error.strerror}); "
            "use 127.0.0.1, or 0.0.0.0 for all interfaces"
        ) from error
    fixed: dict[str, str] = {}
    if "--port" in passed.values:
        port, port_is_given = passed.number("--port", port), True
    elif port_is_given and port:
        fixed["--port"] = str(port)
    counts = {"--port": 1, "--metrics-port": 1, **dict.fromkeys(_QUEUES, num_queues)}
    open_flags = [flag for flag in counts if flag not in (passed.values | fixed)]
    start = (port + 1 if port_is_given else port) if port else any_port
    num_ports = sum(counts[flag] for flag in open_flags)
    block = iter(_free_block(host, start, num_ports, movable=passed.num_nodes == 1))
    chosen = {flag: ",".join(str(next(block)) for _ in range(counts[flag])) for flag in open_flags}
    return fixed | chosen


def _free_block(host: str, start: int, count: int, movable: bool) -> range:
    """The first `count` consecutive ports from `start` on that are all free."""
    base = start
    while base + count - 1 <= _LAST_PORT:
        taken = [port for port in range(base, base + count) if not _is_free(host, port)]
        if not taken:
            return range(base, base + count)
        if not movable:
            raise ConfigError(
                f"port {taken[0]} is taken, and with --ips every machine needs the same ports; "
                "give another --port, or --metrics-port, --engine-worker-queue-port and "
                "--cache-queue-port after --"
            )
        base = taken[-1] + 1
    raise ConfigError(
        f"found no {count} consecutive free ports from {start} on; give a lower --port, or "
        "--metrics-port, --engine-worker-queue-port and --cache-queue-port after --"
    )


def _is_free(host: str, port: int) -> bool:
    """True if a server could listen there now, and on all interfaces, as FastDeploy's queues do.

    A port in TIME_WAIT is free.
    """
    try:
        for address in (host, "0.0.0.0"):
            socket.create_server((address, port), family=_family(address)).close()
    except OSError:
        return False
    return True


def _any_port(host: str) -> int:
    """A port that the system thinks free."""
    with socket.create_server((host, 0), family=_family(host)) as server:
        return int(server.getsockname()[1])


def _family(host: str) -> socket.AddressFamily:
    """Of the interface's address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
