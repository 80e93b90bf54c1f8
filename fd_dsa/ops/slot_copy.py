"""Copies of one slot of several pools to another slot, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.transfers import uploaded
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor

import triton.language as tl  # isort: skip

# words that a program copies at a time, and programs of a pool
_WORDS, _PARTS = 1024, 8


@step_kernel()
def copy_slot_kernel(pools_ptr, source, target, WORDS: tl.constexpr):
    """Copy part `program 1` of a slot of pool `program 0`.

    `pools_ptr` is int64 [pools, 2], address of each pool and words of 4 bytes of its slots.
    """
    pool = pools_ptr + 2 * tl.program_id(0)
    base, size = tl.load(pool).to(tl.pointer_type(tl.int32)), tl.load(pool + 1)
    step = tl.num_programs(1) * WORDS
    for first in range(tl.program_id(1) * WORDS, size.to(tl.int32), step):
        at = first + tl.arange(0, WORDS)
        words = tl.load(base + source * size + at, mask=at < size, other=0)
        tl.store(base + target * size + at, words, mask=at < size)


class SlotCopy:
    """Enqueues copies of slots.

    Args:
        pools: contiguous tensors of `num_slots` slots each, which must not move. The bytes of a
            slot are a multiple of 4.
        allocate: makes tensors on the device of the pools.
    """

    def __init__(self, pools: Sequence[Tensor], num_slots: int, allocate: Allocate) -> None:
        # the pools live as long as the table of their addresses
        self._pools = list(pools)
        table = [
            (pool.data_ptr(), prod(pool.shape) * pool.element_size() // num_slots // 4)
            for pool in pools
        ]
        self._table = uploaded(allocate, np.array(table, np.int64))

    def __call__(self, source: int, target: int) -> None:
        """Enqueue the copy of slot `source` to slot `target`, one launch."""
        copy_slot_kernel[len(self._pools), _PARTS](
            self._table, source, target, WORDS=_WORDS, num_warps=4
        )
