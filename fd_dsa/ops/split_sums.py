"""Sums that several programs share: each leaves its part, and the last to arrive adds them.

Parts are added in their own order, so which program comes last never changes a bit.

Source: the count of arrivals, CUDA samples `threadFenceReduction`.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from fd_dsa.device.transfers import transfers_for
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import INTERPRETING
from fd_dsa.triton_runtime.device_api import api_for_type

import triton  # isort: skip
import triton.language as tl  # isort: skip

NUM_COUNTERS = 1024
"""Tiles of a result whose sums may be split."""
NUM_PARTIALS = 1 << 22
"""float32 sums: 16 MiB, a third of the L2 of a Hopper GPU."""
MOST_SPLITS = 16

_logger = logging.getLogger(__name__)
SCRATCH: dict[Any, Any] = {}
"""Scratch memory by operator and device."""
_COUNTERS = tl.constexpr(NUM_COUNTERS)


@triton.jit
def sum_of_parts(total, scratch_ptr, tile, split, SPLITS: tl.constexpr, mask=None):
    """The sum over SPLITS programs of `total` [M, N], and whether this program has it.

    `tile` numbers the sums of a launch; only values where `mask` is set are summed.
    """
    rows: tl.constexpr = total.shape[0]
    columns: tl.constexpr = total.shape[1]
    size: tl.constexpr = rows * columns
    part = scratch_ptr + _COUNTERS + tile.to(tl.int64) * (SPLITS * size)
    part += tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    tl.store(part + split * size, total, mask=mask)
    # all threads have stored before one of them lets the other programs know
    tl.debug_barrier()
    last = tl.atomic_add(scratch_ptr + tile, 1.0, sem="acq_rel") == SPLITS - 1
    if last:
        total = tl.zeros([rows, columns], tl.float32)
        for other in tl.static_range(SPLITS):
            # past the L1, which other programs' stores do not reach
            total += tl.load(part + other * size, mask=mask, cache_modifier=".cg")
        tl.store(scratch_ptr + tile, 0.0)
    return total, last


def splits_of(steps: int, tiles: int, tile_size: int, programs: int) -> tuple[int, int]:
    """Into how many parts to cut the steps of a sum, and the steps of each; none has no step.

    Args:
        steps: of each sum.
        tiles: sums of the launch.
        tile_size: values of a tile.
        programs: that the launch should have at most, if it has fewer tiles.
    """
    most = min(MOST_SPLITS, NUM_PARTIALS // (tiles * tile_size), programs // tiles)
    if tiles > NUM_COUNTERS:
        most = 1
    each = -(-steps // max(1, most))
    return -(-steps // each), each


def new_scratch(like: Tensor, num_partials: int = NUM_PARTIALS) -> Tensor:
    """Scratch memory for launches that run one at a time.

    Args:
        like: a float32 tensor on the device.

    Returns:
        float32 [NUM_COUNTERS + num_partials]. Counters are float32 as the sums are, so that one
        tensor of any library holds both; they are zero between launches.
    """
    return like.new_zeros([NUM_COUNTERS + num_partials])


def scratch_beside(like: Tensor, operator: str, num_partials: int = NUM_PARTIALS) -> Tensor | None:
    """The device's own scratch memory for an operator, made at the first call, or None.

    None in a capture before any launch outside of one: memory of a graph is no memory to keep, and
    its zeros would be written by a replay.
    """
    api = api_for_type(type(like))
    # interpreted kernels also run on what has no number, such as a CPU's memory
    place = str(getattr(like, "place", "")) if INTERPRETING else api.device_of(like)
    key = operator, api, place
    scratch = SCRATCH.get(key)
    if scratch is None:
        if transfers_for(like).is_capturing():
            _logger.warning(
                "%s: captured before its first run, so the graph keeps its slow form; run a step "
                "before the capture",
                operator,
            )
            return None
        scratch = SCRATCH.setdefault(key, new_scratch(like, num_partials))
    return scratch


def clear_counters(scratch: Tensor | None) -> None:
    """Undo what a launch with an error has counted, which would make every later sum wrong.

    An interpreted launch may end midway; a GPU runs a launch whole, or its error ends the use of
    the device.
    """
    if scratch is not None:
        with suppress(Exception):
            scratch.zero_()
