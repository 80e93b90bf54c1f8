"""Free consecutive ports for what the user left open."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.launch.flags import PassedFlags
from fd_dsa.fastdeploy_plugin.launch.start import choose_ports

HOST = "127.0.0.1"
FLAGS = ("--port", "--metrics-port", "--engine-worker-queue-port", "--cache-queue-port")


@pytest.fixture
def base() -> Iterator[int]:
    """The first of thirteen ports that are free, below those the system gives by itself."""
    for start in range(18000, 30000, 13):
        if all(map(free, range(start, start + 13))):
            yield start
            return
    pytest.fail("no free ports on this machine")


def free(port: int) -> bool:
    try:
        for host in ("0.0.0.0", HOST):
            socket.create_server((host, port)).close()
    except OSError:
        return False
    return True


def choose(port: int, given: bool, num_queues: int = 1, passed: tuple[str, ...] = ()) -> list[str]:
    """The values in the order of `FLAGS`; "" for what the user gave FastDeploy."""
    found = choose_ports(HOST, port, given, PassedFlags.read(passed), num_queues)
    assert list(found) == [flag for flag in FLAGS if flag in found]
    return [found.get(flag, "") for flag in FLAGS]


def texts(*numbers: int) -> list[str]:
    return list(map(str, numbers))


@pytest.mark.parametrize(
    ("given", "taken", "offsets"),
    [
        (True, [], (0, 1, 2, 3)),
        (False, [], (0, 1, 2, 3)),
        # a port that was given stays and the rest moves; a default one moves as well
        (True, [(HOST, 2)], (0, 3, 4, 5)),
        (False, [(HOST, 0), ("0.0.0.0", 3)], (4, 5, 6, 7)),
        # FastDeploy's queues listen on all interfaces
        (True, [("127.0.0.2", 1)], (0, 2, 3, 4)),
    ],
)
def test_four_consecutive_ports(
    base: int, given: bool, taken: list[tuple[str, int]], offsets: tuple[int, ...]
) -> None:
    servers = [socket.create_server((host, base + offset)) for host, offset in taken]
    try:
        assert choose(base, given) == texts(*(base + offset for offset in offsets))
    finally:
        for server in servers:
            server.close()


def test_any_port() -> None:
    first, *others = map(int, choose(0, given=True))
    assert first > 0 and others == [first + 1, first + 2, first + 3]


def test_ports_after_the_dashes_stay_where_they_are(base: int) -> None:
    passed = ("--port", str(base), "--cache-queue-port", "7")
    assert choose(8000, given=False, passed=passed) == ["", *texts(base + 1, base + 2), ""]
    every = tuple(text for flag in FLAGS for text in (flag, "1"))
    assert choose(8000, given=False, passed=every) == [""] * 4
    with pytest.raises(ConfigError, match=r"--port \(after --\): got 'http'"):
        choose(8000, given=False, passed=("--port", "http"))


def test_each_data_parallel_rank_has_its_queues(base: int) -> None:
    workers, caches = (",".join(texts(*(base + n for n in one))) for one in ((2, 3, 4), (5, 6, 7)))
    assert choose(base, given=True, num_queues=3) == [*texts(base, base + 1), workers, caches]


def test_several_machines_need_the_same_ports(base: int) -> None:
    passed = ("--ips", "10.0.0.1,10.0.0.2")
    assert choose(base, given=False, passed=passed)[0] == str(base)
    with (
        socket.create_server((HOST, base + 2)),
        pytest.raises(ConfigError, match=f"port {base + 2} is taken, and with --ips every machine"),
    ):
        choose(base, given=False, passed=passed)


def test_no_room_is_an_error() -> None:
    with pytest.raises(ConfigError, match="found no 3 consecutive free ports from 65534 on"):
        choose(65533, given=True)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_interface_of_another_machine(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host: got '{host}', which is no address of this mac"):
        choose_ports(host, 8000, False, PassedFlags(), 1)
