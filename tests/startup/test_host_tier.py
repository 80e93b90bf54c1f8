"""Host memory of ranks for prefix blocks: equal parts, and a reason where a rank has none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa.distributed.host import HostGroup
from fd_dsa.engine.caches import DSACaches
from fd_dsa.errors import DeviceError
from fd_dsa.runner import block_store, device_block_store
from fd_dsa.startup.host_tier import make_block_stores
from tests.distributed.groups import on_ranks

NUM_BLOCKS, NUM_SLOTS = 4, 6


def make(group: HostGroup, device: str = "cpu") -> Any:
    """Make the store of a rank over four layers, the third without an indexer."""
    widths = (656, 132, 656, 132, 656, None, 656, 132)
    caches = [width and np.zeros((NUM_BLOCKS, width), np.uint8) for width in widths]
    runner: Any = SimpleNamespace(caches=caches, model=SimpleNamespace(group=group))
    memory = SimpleNamespace(num_blocks=NUM_BLOCKS, num_host_blocks=NUM_SLOTS, num_host_snapshots=0)
    plan: Any = SimpleNamespace(memory=memory, device=device, caches=DSACaches)
    return make_block_stores(runner, plan, group)[0]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_keep_equal_parts(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []

    class Store(block_store.HostBlockStore):
        def __init__(self, caches: Any, num_slots: int) -> None:
            super().__init__(caches, num_slots)
            parts.append(num_slots * sum(cache[0].nbytes for cache in caches))

    monkeypatch.setattr(block_store, "HostBlockStore", Store)
    assert all(store.num_slots == NUM_SLOTS for store in on_ranks(size, make))
    whole = NUM_SLOTS * (4 * 656 + 3 * 132)
    assert sum(parts) == whole and max(parts) - min(parts) <= NUM_SLOTS * 132


@pytest.mark.triton
def test_no_rank_has_memory_if_one_cannot_lock_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def take(caches: Any, num_slots: int, own: slice) -> Any:
        if own.start == 1:
            raise DeviceError("cuMemHostAlloc: out of memory")
        return SimpleNamespace(num_slots=num_slots, overlaps=True)

    monkeypatch.setattr(device_block_store, "DeviceBlockStore", take)
    assert on_ranks(3, lambda group: make(group, "gpu:0")) == [None] * 3
    said = "rank 1: cuMemHostAlloc: out of memory; no prefix block is kept in host memory"
    # rank 0 alone says so
    assert caplog.messages == [f"--kv-offload-bytes: {said}"]


@pytest.mark.triton
def test_ranks_that_cannot_gather_rows_have_no_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(HostGroup, "gathers_rows", False)
    assert on_ranks(2, lambda group: make(group, "gpu:0")) == [None] * 2
    assert caplog.messages[0].startswith("--kv-offload-bytes: rank 0: the ranks cannot gather ")
