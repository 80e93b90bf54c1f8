"""A group of ranks with a GPU each: its own all-reduce, and when NCCL serves.

The CUDA source runs here on emulated threads; `test_gpu_ranks` runs it on GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from fd_dsa.distributed.device import DeviceGroup
from tests.distributed.divided_blocks import check_blocks_come_back
from tests.distributed.host_gpus import HostGpus
from tests.distributed.sums import rounded, sum_of, widened
from tests.kernel_memory import open_memory

pytestmark = pytest.mark.triton
# rows and width: few blocks and many, several values a thread, sizes in turn
SHAPES = [(1, 2048), (3, 1024), (150, 64), (2, 12), (20, 512), (2, 1000), (1, 2048), (9, 256)]
# rows of 8 values that so many ranks sum in two stages, the fewest; no multiple of the ranks
TWO_STAGES = {4: 21846, 8: 6242}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostGpus]:
    yield HostGpus(monkeypatch)
    custom_ops.use_library(None)


def shapes_for(size: int) -> list[tuple[int, int]]:
    """Those that ranks take turns at within some seconds; in one stage and in two, in turn."""
    if size < 4:
        return SHAPES
    around = [(TWO_STAGES[size] + more, 8) for more in (-1, 0, 3)]
    some = [shape for shape in SHAPES if prod(shape) <= 3072]
    # the last is as large as the memory
    return [*some, *around, (1, 8), around[1], around[0], (128, 8192)]


def part(rank: int, number: int, rows: int, width: int) -> np.ndarray:
    """Bits of a rank's part, from tiny to large."""
    rng = np.random.default_rng([rank, number])
    return rounded(rng.standard_normal((rows, width)) * 2.0 ** rng.integers(-9, 9, (rows, 1)))


@pytest.mark.parametrize("size", [2, 8])
def test_all_ranks_get_the_sum_in_the_order_of_ranks(gpus: HostGpus, size: int) -> None:
    memory = open_memory("interpreter")

    def work(group: DeviceGroup) -> list[np.ndarray]:
        parts = [part(group.rank, i, *shape) for i, shape in enumerate(shapes_for(size))]
        return [memory.get(group.all_reduce(memory.put(x, "bfloat16"))) for x in parts]

    sums = gpus.run(size, work)
    for number, shape in enumerate(shapes_for(size)):
        expected = sum_of([part(rank, number, *shape) for rank in range(size)])
        for found in sums:
            np.testing.assert_array_equal(found[number], expected, f"{shape}")
    assert gpus.nccl.reduced == []
    assert gpus.ipc.open_handles == 0


@pytest.mark.parametrize(("size", "rows"), [(2, 1), (8, TWO_STAGES[8])])
def test_values_that_look_like_an_empty_slot(gpus: HostGpus, size: int, rows: int) -> None:
    memory = open_memory("interpreter")
    row = np.array([[0xFFFF, 0xFFFF, 0xFFFF, 0x3F80, 0x8000, 0x8000, 0x7F80, 0xFF80]], np.uint16)
    bits, ones = row.repeat(rows, 0), rounded(np.array([[size]]))

    def work(group: DeviceGroup) -> np.ndarray:
        return memory.get(group.all_reduce(memory.put(bits, "bfloat16")))

    for found in gpus.run(size, work):
        assert np.isnan(widened(found[:, :3])).all()
        assert (found[:, 3:4] == ones).all()
        assert (found[:, 4:] == [0, 0, 0x7F80, 0xFF80]).all()


def test_nccl_serves_what_the_kernel_is_not_made_for(gpus: HostGpus) -> None:
    memory = open_memory("interpreter")

    def work(group: DeviceGroup) -> Any:
        group.barrier()
        tensors = np.full((2, 12), group.rank + 1.0, np.float32), part(group.rank, 0, 2, 14)
        odd = memory.put(tensors[1], "bfloat16")
        sums = [memory.get(group.all_reduce(x)) for x in (memory.put(tensors[0]), odd)]
        gathered = group.all_gather(memory.put(np.array([group.rank, 7])))
        return *sums, memory.get(gathered)

    for plain, narrow, gathered in gpus.run(2, work):
        np.testing.assert_array_equal(plain, np.full((2, 12), 3.0))
        np.testing.assert_array_equal(narrow, sum_of([part(rank, 0, 2, 14) for rank in range(2)]))
        np.testing.assert_array_equal(gathered, [[0, 7], [1, 7]])
    assert gpus.nccl.reduced == [24, 24, 28, 28]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_gets_its_part_of_a_sum(gpus: HostGpus, dtype: str) -> None:
    memory, parts = open_memory("interpreter"), [part(rank, 0, 6, 8) for rank in range(3)]
    if dtype == "float32":
        parts = [widened(one) for one in parts]

    def work(group: DeviceGroup) -> np.ndarray:
        return memory.get(group.reduce_scatter(memory.put(parts[group.rank], dtype)))

    total = sum_of(parts) if dtype == "bfloat16" else np.sum(parts, 0)
    for rank, found in enumerate(gpus.run(3, work)):
        np.testing.assert_array_equal(found, total[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_exchange_rows_of_different_numbers(gpus: HostGpus, size: int) -> None:
    memory, ranks = open_memory("interpreter"), range(size)
    # rows of each pair: none, one or two
    rows = [[np.full(((a + 2 * b) % 3, 4), 10 * a + b, np.int32) for b in ranks] for a in ranks]

    def work(group: DeviceGroup) -> np.ndarray:
        sent, wanted = rows[group.rank], [row[group.rank] for row in rows]
        # a row before the first part stays
        bounds, places = (np.cumsum([1, *map(len, parts)]).tolist() for parts in (sent, wanted))
        target = memory.put(np.full((places[-1], 4), -1, np.int32))
        source = memory.put(np.concatenate([np.zeros((1, 4), np.int32), *sent]))
        group.exchange_rows(source, bounds, target, places)
        return memory.get(target)

    for rank, found in enumerate(gpus.run(size, work)):
        wanted = np.concatenate([row[rank] for row in rows])
        np.testing.assert_array_equal(found[1:], wanted)
        assert (found[0] == -1).all()


@pytest.mark.parametrize("size", [2, 3])
def test_rows_of_all_ranks_are_gathered_in_place(gpus: HostGpus, size: int) -> None:
    memory = open_memory("interpreter")
    wanted = np.arange(40, dtype=np.int32).reshape(10, 4)
    # rows outside of the parts, a part without rows
    bounds = [2, 5, 5, 9][: size + 1]

    def work(group: DeviceGroup) -> tuple[bool, np.ndarray]:
        own = np.full_like(wanted, -1)
        begin, end = bounds[group.rank : group.rank + 2]
        own[begin:end] = wanted[begin:end]
        rows = memory.put(own)
        group.all_gather_rows(rows, bounds)
        return group.gathers_rows, memory.get(rows)

    for works, found in gpus.run(size, work):
        assert works
        np.testing.assert_array_equal(found[2 : bounds[-1]], wanted[2 : bounds[-1]])
        assert (np.delete(found, np.s_[2 : bounds[-1]], axis=0) == -1).all()


def test_tensors_of_all_ranks_are_gathered_at_once(gpus: HostGpus) -> None:
    memory = open_memory("interpreter")
    wanted = [np.arange(6 * width, dtype=np.int32).reshape(6, width) for width in (4, 1, 3, 2, 5)]

    def work(group: DeviceGroup) -> list[np.ndarray]:
        tensors = []
        for index, rows in enumerate(wanted):
            own = np.full_like(rows, -1)
            if index % 2 == group.rank:
                own[2:5] = rows[2:5]
            tensors.append(memory.put(own))
        group.all_gather_tensors(tensors, 2, 5)
        return [memory.get(rows) for rows in tensors]

    for found in gpus.run(2, work):
        for rows, expected in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(rows[2:5], expected[2:5])
            assert (np.delete(rows, np.s_[2:5], axis=0) == -1).all()


@pytest.mark.parametrize("size", [2, 4])
def test_blocks_come_back_whole_from_the_host_memory_of_all_ranks(
    gpus: HostGpus, size: int
) -> None:
    memory = open_memory("interpreter")
    # of four ranks, one has no cache to copy
    gpus.run(size, lambda group: check_blocks_come_back(memory, group, (4, 1, 3)))


def test_a_gather_of_rows_that_fails_is_found_at_the_start(
    gpus: HostGpus, caplog: pytest.LogCaptureFixture
) -> None:
    gpus.broadcasts = False
    assert gpus.run(2, lambda group: group.gathers_rows) == [False, False]
    said = "gather of rows: unavailable (ncclBroadcast: NCCL error 1: unhandled cuda error)"
    assert caplog.messages == [said] * 2


def test_without_peer_access_nccl_serves_all_ranks(
    gpus: HostGpus, caplog: pytest.LogCaptureFixture
) -> None:
    memory, gpus.ipc.refuse = open_memory("interpreter"), (1,)
    caplog.set_level(logging.INFO)
    x = part(0, 0, 1, 64)

    def work(group: DeviceGroup) -> np.ndarray:
        return memory.get(group.all_reduce(memory.put(x, "bfloat16")))

    for found in gpus.run(2, work):
        np.testing.assert_array_equal(found, sum_of([x, x]))
    assert gpus.nccl.reduced == [64] * 2
    lines = [m for m in caplog.messages if m.startswith("all-reduce of a decode step among 2 GPUs")]
    assert sorted("NCCL (no peer access" in line for line in lines) == [False, True]
    assert all("NCCL" in line for line in lines)


@pytest.mark.parametrize(
    ("size", "absent", "rows"),
    # eight ranks that wait take twenty seconds of two cores
    [(4, 2, 1), pytest.param(8, 7, TWO_STAGES[8], marks=pytest.mark.slow)],
)
def test_a_rank_that_does_not_come_is_named(
    gpus: HostGpus, size: int, absent: int, rows: int
) -> None:
    memory = open_memory("interpreter")

    def work(group: DeviceGroup) -> str:
        if group.rank != absent:
            group.all_reduce(memory.put(part(0, 0, rows, 8), "bfloat16"))
        return group.failure()

    # on a busy processor a rank that comes may take a second
    timeout_s = 2.5
    said = f"rank {absent} did not come to an all-reduce for {timeout_s} s"
    expected = ["" if rank == absent else said for rank in range(size)]
    assert gpus.run(size, work, timeout_s=timeout_s) == expected
