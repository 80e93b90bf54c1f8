"""Copies of one slot to another one in a tensor with slots of several layers."""

from __future__ import annotations

from math import prod

from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor

import triton.language as tl  # isort: skip

# values that a program copies at a time, and programs of a layer
_VALUES, _PARTS = 1024, 16


@step_kernel()
def copy_slot_kernel(slots_ptr, source, target, num_slots, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Copy part `program 1` of the slot of layer `program 0`, which has SIZE values."""
    layer = slots_ptr + tl.program_id(0).to(tl.int64) * num_slots * SIZE
    old, new = layer + source.to(tl.int64) * SIZE, layer + target.to(tl.int64) * SIZE
    for first in range(tl.program_id(1) * TILE, SIZE, tl.num_programs(1) * TILE):
        at = first + tl.arange(0, TILE)
        values = tl.load(old + at, mask=at < SIZE, other=0.0)
        tl.store(new + at, values, mask=at < SIZE)


def copy_slot(slots: Tensor, num_slots: int, num_layers: int, source: int, target: int) -> None:
    """Copy slot `source` of each layer to its slot `target`, one launch.

    Args:
        slots: contiguous, slots of the first layer, then of the next one.
        num_slots: slots of a layer.
    """
    size = prod(slots.shape) // (num_layers * num_slots)
    copy_slot_kernel[num_layers, _PARTS](
        slots, source, target, num_slots, SIZE=size, TILE=_VALUES, num_warps=4
    )
