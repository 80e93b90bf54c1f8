"""Host memory of several ranks: each holds a part of every block, and all get whole blocks back."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fd_dsa.distributed.host import HostGroup
from fd_dsa.runner.block_store import HostBlockStore
from fd_dsa.runner.rank_blocks import DividedBlockStore, SentBlockStore, make_calls
from tests.distributed.groups import on_ranks

NUM_BLOCKS, NUM_SLOTS = 6, 5
SHAPES = (((2, 3), np.float32), ((5,), np.uint8), ((1, 2, 2), np.int16))


def made(group: HostGroup) -> tuple[DividedBlockStore, list[np.ndarray], int]:
    """Return the store of a rank, its caches, and the bytes of host memory that it takes."""
    caches = [
        np.arange(NUM_BLOCKS * int(np.prod(shape)), dtype=dtype).reshape(NUM_BLOCKS, *shape)
        for shape, dtype in SHAPES
    ]
    own = caches[group.rank :: group.size]
    store = DividedBlockStore(HostBlockStore(own, NUM_SLOTS), caches, group)
    return store, caches, NUM_SLOTS * sum(cache[0].nbytes for cache in own)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_blocks_come_back_whole_on_all_ranks(size: int) -> None:
    def work(group: HostGroup) -> tuple[list[np.ndarray], int]:
        store, caches, num_bytes = made(group)
        store.begin()
        store.copy(False, 1, 2, 3)
        store.end(3)
        for cache in caches:
            cache[:] = 0
        store.begin()
        store.copy(True, 3, 2, 2)
        store.copy(True, 0, 4, 1)
        store.end(6)
        store.precede(5)
        assert store.num_done == 6 and store.num_slots == NUM_SLOTS and not store.overlaps
        return caches, num_bytes

    found = on_ranks(size, work)
    for caches, _ in found:
        for cache, (shape, dtype) in zip(caches, SHAPES, strict=True):
            old = np.arange(cache.size, dtype=dtype).reshape(NUM_BLOCKS, *shape)
            wanted = np.zeros_like(old)
            wanted[3:5], wanted[0] = old[1:3], old[3]
            np.testing.assert_array_equal(cache, wanted)
    # the ranks have the memory of one together
    whole = NUM_SLOTS * sum(np.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in SHAPES)
    assert sum(num_bytes for _, num_bytes in found) == whole


class Group:
    """Records what is gathered."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.gathered: list[tuple[int, int]] = []

    def all_gather_tensors(self, tensors: Sequence[Any], begin: int, end: int) -> None:
        assert tensors == ["latents", "keys"]
        self.gathered.append((begin, end))


class Share:
    """A store whose copies are never done."""

    num_slots, overlaps, num_done = NUM_SLOTS, True, 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self.calls.append((name, *given))


def test_a_step_gathers_what_it_waits_for_once_and_nothing_later() -> None:
    share, group = Share(), Group()
    store = DividedBlockStore(share, ["latents", "keys"], group)
    for number, loads in ((2, True), (4, False), (6, True), (8, True), (10, True)):
        store.begin()
        store.copy(loads, number, 0, 2)
        store.end(number)
    store.precede(3)
    assert group.gathered == [(2, 4)]
    # copy 5 is done with copy 6, to whose `end` the device waits
    for number, gathered in ((5, [(6, 8)]), (6, []), (9, [(8, 12)])):
        group.gathered.clear()
        store.precede(number)
        assert group.gathered == gathered
    assert [call for call in share.calls if call[0] == "precede"] == [
        ("precede", number) for number in (3, 5, 6, 9)
    ]
    assert store.overlaps and store.num_done == 0


def test_calls_wait_for_the_next_step_and_run_on_all_ranks() -> None:
    own, other = Share(), Share()
    store = SentBlockStore(own)
    for turn in range(2):
        store.begin()
        store.copy(bool(turn), 1, 2, 3)
        store.end(3)
        store.precede(2)
        assert not own.calls
        make_calls(other, pickle.loads(pickle.dumps(store.calls)))
        store.run()
        wanted = [("begin",), ("copy", bool(turn), 1, 2, 3), ("end", 3), ("precede", 2)]
        assert own.calls == other.calls == wanted and not store.calls
        own.calls.clear()
        other.calls.clear()
    assert (store.num_slots, store.overlaps, store.num_done) == (NUM_SLOTS, True, 0)
