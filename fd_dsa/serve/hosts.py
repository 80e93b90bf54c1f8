"""Which values of the Host header are served: a page may let its own name resolve to this machine.

A browser lets a page ask the address that the page's name resolves to. An attacker who changes that
address to 127.0.0.1 (DNS rebinding) would reach a server that only programs of this machine should
reach; the Host header is still the attacker's name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fd_dsa.serve.errors import ApiError, show

ANY_HOST = "*"
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/\s]+)(:[0-9]*)?")


@dataclass(frozen=True)
class HostRule:
    """The hosts that requests may name.

    Attributes:
        names: in lower case; localhost and loopback addresses need not be among them.
        takes_addresses: whether every IP address is allowed, as nobody can let one resolve to
            another; probes of an orchestrator come with the server's.
    """

    names: frozenset[str]
    takes_addresses: bool

    def check(self, value: str) -> None:
        """Refuse a Host header.

        Raises:
            ApiError: 403, the host is none of this server's.
        """
        match = _HOST.fullmatch(value)
        host = match[1].strip("[]").lower().rstrip(".") if match else ""
        if host != "localhost" and host not in self.names and not self._takes_address(host):
            raise ApiError(
                403,
                f"Host: got {show(value)}, which is no name of this server; allowed are localhost "
                "and those of --host and --allowed-host",
                code="host_not_allowed",
            )

    def _takes_address(self, host: str) -> bool:
        """Whether the host is an IP address that is allowed."""
        address = _address(host)
        return address is not None and (self.takes_addresses or address.is_loopback)


def host_rule(host: str, bound: str, allowed: Iterable[str]) -> HostRule | None:
    """The rule of a server; None where every Host is served.

    Args:
        host: the --host of the command line.
        bound: the address that it resolved to.
        allowed: the values of --allowed-host.
    """
    names = frozenset(name.strip("[]").lower() for name in (host, *allowed))
    address = _address(bound)
    is_loopback = address is not None and address.is_loopback
    if ANY_HOST in names or not (is_loopback or allowed):
        return None
    return HostRule(names, takes_addresses=not is_loopback)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IP address, None for a name."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
