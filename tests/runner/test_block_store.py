"""Host memory for cache blocks: on a CPU at once, on a device by a stream of its own.

The device is the late driver, which runs streams in any order that their events allow.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.errors import DeviceError
from fd_dsa.runner.block_store import HostBlockStore
from fd_dsa.runner.device_block_store import DeviceBlockStore
from tests.triton_runtime.fakes import FakeTensor
from tests.triton_runtime.late_driver import MAIN, LateLibrary, LateTensor, late_driver

NUM_BLOCKS, NUM_SLOTS = 6, 5


class Cache(LateTensor):
    """A cache of int32 [num_blocks, width] in the memory of the late device."""

    def element_size(self) -> int:
        return 4


def test_a_cpu_copies_all_caches_of_neighbouring_blocks_at_once() -> None:
    floats = np.arange(24, dtype=np.float32).reshape(6, 1, 2, 2)
    caches = [floats, np.arange(18, dtype=np.int16).reshape(6, 3)]
    before = [cache.copy() for cache in caches]
    store = HostBlockStore(caches, NUM_SLOTS)
    store.begin()
    store.copy(False, 1, 2, 3)
    store.end(3)
    assert store.num_done == 3 and not store.overlaps
    for cache in caches:
        cache[:] = 0
    store.copy(True, 4, 3, 2)
    for cache, old in zip(caches, before, strict=True):
        assert (cache[4:] == old[2:4]).all() and not cache[:4].any()


@pytest.fixture
def library() -> Iterator[LateLibrary]:
    """The device of one test."""
    with late_driver() as library:
        yield library


def made(library: LateLibrary) -> tuple[DeviceBlockStore, list[Cache], int]:
    """Return a store, its caches full of the numbers of their blocks, and its stream."""
    caches = [Cache((NUM_BLOCKS, width), "int32") for width in (3, 5)]
    for cache in caches:
        cache.values[:] = np.arange(NUM_BLOCKS)[:, None]
    store = DeviceBlockStore(caches, NUM_SLOTS)
    return store, caches, max(library._queues)


@pytest.mark.triton
def test_the_driver_calls_of_copies_in_both_directions(library: LateLibrary) -> None:
    store, _, stream = made(library)
    assert store.overlaps and store.num_done == 0
    library.log.clear()
    store.begin()
    store.copy(False, 1, 0, 2)
    store.copy(True, 4, 3, 1)
    store.end(3)
    store.precede(2)
    ready, end = 1, 2
    assert library.log == [
        ("record", MAIN, ready),
        ("wait", stream, ready),
        ("d2h", stream, 2 * 12),
        ("d2h", stream, 2 * 20),
        ("h2d", stream, 12),
        ("h2d", stream, 20),
        ("record", stream, end),
        ("wait", MAIN, end),
    ]
    # the host waits for nothing
    assert store.num_done == 0
    library.run()
    assert store.num_done == 3
    library.log.clear()
    store.precede(3)
    assert library.log == []


@pytest.mark.triton
@pytest.mark.parametrize(("rank", "widths"), [(0, [3]), (1, [5]), (2, [])])
def test_a_rank_copies_and_keeps_caches_of_its_own(
    rank: int, widths: list[int], library: LateLibrary
) -> None:
    caches = [Cache((NUM_BLOCKS, width), "int32") for width in (3, 5)]
    store = DeviceBlockStore(caches, NUM_SLOTS, slice(rank, None, 3))
    stream = max(library._queues)
    store.begin()
    store.copy(False, 1, 0, 2)
    store.end(2)
    copies = [call for call in library.log if call[0] == "d2h"]
    assert copies == [("d2h", stream, 2 * 4 * width) for width in widths]
    # a rank without a cache still says when it is done
    library.run()
    assert store.num_done == 2


@pytest.mark.triton
def test_copies_run_beside_steps_that_do_not_wait_for_them(library: LateLibrary) -> None:
    store, caches, _ = made(library)
    store.begin()
    store.copy(False, 0, 0, NUM_SLOTS)
    store.end(1)
    done: list[str] = []
    library.launch(MAIN, lambda: done.append("step"))
    library.run(MAIN)
    # the copy has not begun, and the step is over
    assert done == ["step"] and store.num_done == 0
    library.run()
    assert store.num_done == 1
    store.precede(1)
    assert (caches[0].values[:, 0] == np.arange(NUM_BLOCKS)).all()


@pytest.mark.triton
@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 30), work=st.lists(st.integers(0, 9), min_size=8, max_size=24))
def test_blocks_are_written_and_read_only_between_their_copies(seed: int, work: list[int]) -> None:
    """Each turn saves a block, overwrites it by a step, and loads it elsewhere for a reader."""
    with late_driver(seed) as library:
        store, caches, _ = made(library)
        seen: list[list[int]] = []
        for turn, entries in enumerate(work):
            block, other = turn % 3, 3 + turn % 3
            for cache in caches:
                library.launch(MAIN, lambda c=cache, b=block, t=turn: c.values[b].fill(t))
            store.begin()
            store.copy(False, block, turn % NUM_SLOTS, 1)
            store.copy(True, other, turn % NUM_SLOTS, 1)
            store.end(turn + 1)
            store.precede(turn + 1)
            for cache in caches:
                library.launch(MAIN, lambda c=cache, b=block: c.values[b].fill(-1))
                library.launch(MAIN, lambda c=cache, o=other: seen.append(c.values[o].tolist()))
            for _ in range(entries):
                library.step()
        library.run()
        assert seen == [[turn] * width for turn in range(len(work)) for width in (3, 5)]
        assert store.num_done == len(work)
        del store


@pytest.mark.triton
def test_no_copy_arrives_after_the_memory_is_gone(library: LateLibrary) -> None:
    store, caches, stream = made(library)
    store.begin()
    store.copy(False, 0, 0, 1)
    store.end(1)
    caches.clear()
    del store
    gc.collect()
    last = library.log.index(("sync stream", stream))
    freed = [call[1] for call in library.log[last + 1 :]]
    assert sorted(freed) == ["event", "event", "host", "host", "stream", "tensor", "tensor"]


@pytest.mark.triton
def test_a_driver_that_cannot_lock_the_memory_is_named(
    library: LateLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LateLibrary, "cuMemHostAlloc", lambda *_: 2)
    with pytest.raises(DeviceError, match="cuMemHostAlloc"):
        made(library)
    assert isinstance(Cache((1, 1), "int32"), FakeTensor)
