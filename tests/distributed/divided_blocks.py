"""Blocks of caches that go to the host memory of all ranks and come back to other places."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fd_dsa.device.transfers import transfers_for
from fd_dsa.distributed import Group
from fd_dsa.runner.device_block_store import DeviceBlockStore
from fd_dsa.runner.rank_blocks import DividedBlockStore
from tests.kernel_memory import KernelMemory

NUM_BLOCKS, NUM_SLOTS = 6, 4
# caches of DeepSeek-V3.2 in fp8_ds_mla, bytes of a block, in the order of their sizes
LARGE = [64 * 132] * 61 + [64 * 656] * 61


def check_blocks_come_back(memory: KernelMemory, group: Group, widths: Sequence[int]) -> None:
    """Check that a rank gets whole blocks back, although it keeps a part of each.

    Args:
        widths: bytes of a block of each cache, which are the same on all ranks.
    """
    draw = np.random.default_rng(3)
    before = [draw.integers(0, 256, (NUM_BLOCKS, width), np.uint8) for width in widths]
    caches = [memory.put(rows) for rows in before]
    share = DeviceBlockStore(caches, NUM_SLOTS, slice(group.rank, None, group.size))
    store = DividedBlockStore(share, caches, group)
    store.begin()
    store.copy(False, 1, 0, 3)
    store.end(3)
    store.precede(3)
    zeros = [np.zeros_like(rows) for rows in before]
    for cache, rows in zip(caches, zeros, strict=True):
        # a step that overwrites the blocks waits for their copies
        transfers_for(cache).to_device(cache, rows)
    store.begin()
    store.copy(True, 3, 0, 2)
    store.copy(True, 0, 2, 1)
    store.end(6)
    store.precede(6)
    found = [memory.get(cache) for cache in caches]
    assert store.num_done == 6
    for rows, old, expected in zip(found, before, zeros, strict=True):
        expected[[3, 4, 0]] = old[1:4]
        np.testing.assert_array_equal(rows, expected)
