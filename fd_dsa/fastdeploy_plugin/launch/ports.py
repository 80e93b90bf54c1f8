"""The ports of FastDeploy's server: its HTTP port, and those of its own processes."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.launch.flags import PassedFlags

_LAST_PORT = 65535


@dataclass(frozen=True)
class Ports:
    """Where FastDeploy's server listens.

    Attributes:
        http: of the OpenAI API.
        metrics: of `/metrics`.
        arguments: FastDeploy's flags for the ports that the user did not give it.
    """

    http: int
    metrics: int
    arguments: tuple[str, ...]


def choose_ports(
    host: str, port: int, port_is_given: bool, passed: PassedFlags, num_queues: int
) -> Ports:
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

    Raises:
        ConfigError: the interface is none of this machine's; no such ports are free; on several
            machines, where all must have the same ports, those above the HTTP port are taken.
    """
    _check_host(host)
    given = passed.values
    if "--port" in given:
        port, port_is_given = passed.number("--port", port), True
    wanted = [] if port_is_given and port else ["--port"]
    wanted += [] if "--metrics-port" in given else ["--metrics-port"]
    for queue in ("--engine-worker-queue-port", "--cache-queue-port"):
        wanted += [] if queue in given else [queue] * num_queues
    start = (port + 1 if port_is_given else port) if port else _any_port(host)
    found = _free_block(host, start, len(wanted), movable=passed.num_nodes == 1)
    ports: dict[str, list[str]] = {}
    for flag, number in zip(wanted, found, strict=True):
        ports.setdefault(flag, []).append(str(number))
    if "--port" not in given:
        ports = {"--port": ports.get("--port", [str(port)]), **ports}
    http = int(ports["--port"][0]) if "--port" in ports else port
    metrics = int(ports.get("--metrics-port", ["0"])[0]) or passed.number("--metrics-port", 0)
    arguments = tuple(text for flag in ports for text in (flag, ",".join(ports[flag])))
    return Ports(http, metrics, arguments)


def _check_host(host: str) -> None:
    """Refuse an interface on which nothing can listen."""
    try:
        _any_port(host)
    except OSError as error:
        raise ConfigError(
            f"--host: got {host!r}, which is no address of this machine ({error.strerror}); "
            "use 127.0.0.1, or 0.0.0.0 for all interfaces"
        ) from error


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
    """True if `port` can be had on the interface and, as FastDeploy's queues want, on all."""
    return all(_can_bind(address, port) for address in (host, "0.0.0.0"))


def _can_bind(host: str, port: int) -> bool:
    """True if a server could listen there now; a port in TIME_WAIT is free."""
    try:
        with socket.create_server((host, port), family=_family(host)):
            return True
    except OSError:
        return False


def _any_port(host: str) -> int:
    """A port that the system thinks free."""
    with socket.create_server((host, 0), family=_family(host)) as probe:
        return int(probe.getsockname()[1])


def _family(host: str) -> socket.AddressFamily:
    """Of the interface's address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
