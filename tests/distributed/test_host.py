"""Collectives and messages of ranks on one machine."""

from __future__ import annotations

import os
import threading
import time
from functools import reduce

import numpy as np
import pytest

from fd_dsa.distributed.host import HostGroup, Shared
from fd_dsa.errors import RankError
from tests.distributed.groups import on_ranks

# one value, a piece of the shared memory, one more, several pieces
SHAPES = [(1,), (3, 5), (0, 8), (1 << 18,), ((1 << 18) + 1,), (7, 100_003)]


def values(rank: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal(shape, np.float32)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_those_of_the_order_of_ranks(size: int) -> None:
    def work(group: HostGroup) -> list[np.ndarray]:
        # a view whose rows are apart, too
        apart = np.repeat(values(group.rank, (4, 6)), 2, axis=1)[:, ::2]
        return [group.all_reduce(x) for x in (*(values(group.rank, s) for s in SHAPES), apart)]

    results = on_ranks(size, work)
    for number, shape in enumerate([*SHAPES, (4, 6)]):
        expected = reduce(np.add, [values(rank, shape) for rank in range(size)])
        for found in results:
            np.testing.assert_array_equal(found[number], expected)


def test_gathered_tensors_are_in_the_order_of_ranks() -> None:
    def work(group: HostGroup) -> list[np.ndarray]:
        group.barrier()
        return [group.all_gather(values(group.rank, shape)) for shape in SHAPES]

    for found in on_ranks(3, work):
        for shape, gathered in zip(SHAPES, found, strict=True):
            np.testing.assert_array_equal(gathered, [values(rank, shape) for rank in range(3)])


@pytest.mark.parametrize("bounds", [[0, 2, 3, 7], [1, 1, 6, 6], [0, 0, 0, 0], [3, 7, 7, 7]])
def test_rows_are_gathered_in_place(bounds: list[int]) -> None:
    # a row is larger than a piece of the shared memory
    wanted = values(0, (7, (1 << 18) + 3))

    def work(group: HostGroup) -> np.ndarray:
        rows = np.zeros_like(wanted)
        own = slice(*bounds[group.rank : group.rank + 2])
        rows[own] = wanted[own]
        group.all_gather_rows(rows, bounds)
        return rows

    outside = np.ones(7, bool)
    outside[bounds[0] : bounds[-1]] = False
    expected = np.where(outside[:, None], np.float32(0), wanted)
    for found in on_ranks(3, work):
        np.testing.assert_array_equal(found, expected)


def test_messages_arrive_whole_and_in_order_and_may_wait() -> None:
    sent = [bytes([number]) * length for number, length in enumerate([0, 5, 3 << 20, 1 << 20, 7])]
    sent += [b"x" * 100] * 20

    def work(group: HostGroup) -> list[bytes]:
        if group.rank == 0:
            for message in sent:
                group.send(message)
            return sent
        if group.rank == 2:
            # rank 0 and the other one are ahead
            time.sleep(0.05)
        return [group.receive() for _ in sent]

    assert on_ranks(3, work) == [sent] * 3


def test_who_waits_learns_of_the_end_of_another() -> None:
    shared = Shared.create(2)
    group = HostGroup(0, shared)

    def end() -> None:
        group.failure = RankError("rank 1 ended")

    timer = threading.Timer(0.05, end)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(RankError, match="rank 1 ended"):
        group.all_reduce(np.ones(3, np.float32))
    assert time.monotonic() - begin < 5
    # and a later call does not wait
    with pytest.raises(RankError, match="rank 1 ended"):
        group.barrier()
    open_files = len(os.listdir("/proc/self/fd"))
    group.close()
    group.close()
    assert len(os.listdir("/proc/self/fd")) == open_files - len(shared.descriptors)
