"""Free consecutive ports for what the user left open."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.launch.flags import PassedFlags
from fd_dsa.fastdeploy_plugin.launch.ports import Ports, choose_ports

HOST = "127.0.0.1"


@pytest.fixture
def base() -> Iterator[int]:
    """The first of thirteen ports that are free, below those the system gives by itself."""
    for start in range(18000, 30000, 13):
        if choose(start, given=True, num_queues=6).http == start and all(map(free, block(start))):
            yield start
            return
    pytest.fail("no free ports on this machine")


def block(start: int) -> range:
    return range(start, start + 13)


def free(port: int) -> bool:
    try:
        with socket.create_server(("0.0.0.0", port)):
            return True
    except OSError:
        return False


def choose(port: int, given: bool, num_queues: int = 1, passed: tuple[str, ...] = ()) -> Ports:
    return choose_ports(HOST, port, given, PassedFlags.read(passed), num_queues)


def arguments(http: int, metrics: int, workers: object, caches: object) -> tuple[str, ...]:
    return (
        *("--port", str(http)),
        *("--metrics-port", str(metrics)),
        *("--engine-worker-queue-port", str(workers)),
        *("--cache-queue-port", str(caches)),
    )


@pytest.mark.parametrize("given", [True, False])
def test_four_consecutive_ports(base: int, given: bool) -> None:
    found = choose(base, given)
    assert found == Ports(base, base + 1, arguments(base, base + 1, base + 2, base + 3))


def test_a_port_that_was_given_stays_and_the_rest_moves(base: int) -> None:
    with socket.create_server((HOST, base + 2)):
        found = choose(base, given=True)
        assert found.arguments == arguments(base, base + 3, base + 4, base + 5)


def test_a_default_port_moves_as_well(base: int) -> None:
    with socket.create_server((HOST, base)), socket.create_server(("0.0.0.0", base + 3)):
        found = choose(base, given=False)
        assert found.arguments == arguments(base + 4, base + 5, base + 6, base + 7)


def test_a_port_that_is_taken_on_another_interface(base: int) -> None:
    # FastDeploy's queues listen on all of them
    with socket.create_server(("127.0.0.2", base + 1)):
        assert choose(base, given=True).metrics == base + 2


def test_any_port() -> None:
    found = choose(0, given=True)
    assert found.http > 0
    assert found.arguments == arguments(*range(found.http, found.http + 4))


def test_ports_after_the_dashes_stay_where_they_are(base: int) -> None:
    passed = ("--port", str(base), "--cache-queue-port", "7")
    found = choose(8000, given=False, passed=passed)
    queue = ("--engine-worker-queue-port", str(base + 2))
    assert found == Ports(base, base + 1, ("--metrics-port", str(base + 1), *queue))
    every = (*arguments(1, 2, 3, 4),)
    assert choose(8000, given=False, passed=every) == Ports(1, 2, ())


def test_each_data_parallel_rank_has_its_queues(base: int) -> None:
    found = choose(base, given=True, num_queues=3)
    workers = ",".join(str(base + n) for n in (2, 3, 4))
    caches = ",".join(str(base + n) for n in (5, 6, 7))
    assert found.arguments == arguments(base, base + 1, workers, caches)


def test_several_machines_need_the_same_ports(base: int) -> None:
    passed = ("--ips", "10.0.0.1,10.0.0.2")
    assert choose(base, given=False, passed=passed).http == base
    with (
        socket.create_server((HOST, base + 2)),
        pytest.raises(ConfigError, match=f"port {base + 2} is taken, and with --ips every machine"),
    ):
        choose(base, given=False, passed=passed)


def test_no_room_is_an_error() -> None:
    with pytest.raises(ConfigError, match="found no 3 consecutive free ports from 65534 on"):
        choose(65533, given=True)


def test_a_port_that_is_no_number() -> None:
    with pytest.raises(ConfigError, match=r"--port \(after --\): got 'http'"):
        choose(8000, given=False, passed=("--port", "http"))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_interface_of_another_machine(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host: got '{host}', which is no address of this mac"):
        choose_ports(host, 8000, False, PassedFlags(), 1)
