"""Tiles of launches, and sums that are split among programs.

Each program of a split sum stores a part, and the last program adds all parts. It adds them in a
fixed order, so the order of the programs never changes a bit.

Source: CUDA samples, `threadFenceReduction` for the count of finished programs.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from fd_dsa.device.transfers import transfers_for
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import INTERPRETING
from fd_dsa.triton_runtime.device_api import api_for_type
from fd_dsa.triton_runtime.interpreter import ON_FAILURE

import triton  # isort: skip
import triton.language as tl  # isort: skip

NUM_COUNTERS = 1024
"""Maximum number of tiles of a result whose sums are split."""
NUM_PARTIALS = 1 << 22
"""Number of float32 parts: 16 MiB, a third of the L2 cache of a Hopper GPU."""
MAX_SPLITS = 16
PROCESSORS = 132
"""Multiprocessors of an H100 or H200. Elsewhere tiles and splits fit less well."""
# rows for which tiles are chosen in batch-invariant mode: enough to split no sum
_MANY_ROWS = 8192

_logger = logging.getLogger(__name__)
SCRATCH: dict[Any, Any] = {}
"""Scratch memory by operator and device."""
_COUNTERS = tl.constexpr(NUM_COUNTERS)


class Tiling(NamedTuple):
    """Tiles of a GEMM or of attention, and the options of a launch.

    Attributes:
        rows, columns: size of a tile. In FP8 128 is a multiple of `columns`.
        num_warps, num_stages: options of a launch. A stage is a group of 128 values along K.
        programs: maximum number of programs of a launch whose K is split.
        maxnreg: maximum number of registers of a thread; None = as many as there are.
        column_tiles: number of tiles of neighbouring columns that a program of a grouped GEMM
            computes in order.
        groups: number of groups of 128 values along K in a stage of an FP8 GEMM.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    programs: int = 1
    maxnreg: int | None = None
    column_tiles: int = 1
    groups: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Constants and options of a launch by name."""
        options = {
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


@triton.jit
def is_last(counter_ptr, programs):
    """Count a program, and return True in the last of `programs`. Its counter is zero again.

    The last program may load what the others have stored, but not from the L1 cache.
    """
    # all threads must have stored their values before one of them counts this program
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1.0, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0.0)
    return last


@triton.jit
def sum_of_parts(total, scratch_ptr, tile, split, SPLITS: tl.constexpr, mask=None):
    """Return the sum over SPLITS programs of `total` [M, N], and True in the program that has it.

    `tile` is the number of the sum in its launch. Only values with a set `mask` are summed.
    """
    rows: tl.constexpr = total.shape[0]
    columns: tl.constexpr = total.shape[1]
    size: tl.constexpr = rows * columns
    part = scratch_ptr + _COUNTERS + tile.to(tl.int64) * (SPLITS * size)
    part += tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    tl.store(part + split * size, total, mask=mask)
    last = is_last(scratch_ptr + tile, SPLITS)
    if last:
        total = tl.zeros([rows, columns], tl.float32)
        for other in tl.static_range(SPLITS):
            # bypass the L1 cache, because stores of other programs do not reach it
            total += tl.load(part + other * size, mask=mask, cache_modifier=".cg")
    return total, last


@triton.jit
def columns_of_parts(values, scratch_ptr, tile, PARTS: tl.constexpr, mask):
    """Return the values of PARTS neighbouring tiles side by side, and True in the program with all.

    `values` [M, N] are those of `tile`. Only values with a set `mask` [M, 1] are exchanged.
    """
    rows: tl.constexpr = values.shape[0]
    columns: tl.constexpr = values.shape[1]
    wide: tl.constexpr = PARTS * columns
    number = tile // PARTS
    place = scratch_ptr + _COUNTERS + number.to(tl.int64) * (rows * wide)
    place += tl.arange(0, rows)[:, None] * wide
    tl.store(place + tile % PARTS * columns + tl.arange(0, columns)[None, :], values, mask=mask)
    last = is_last(scratch_ptr + number, PARTS)
    joined = tl.zeros([rows, wide], tl.float32)
    if last:
        # as in `sum_of_parts`
        joined = tl.load(
            place + tl.arange(0, wide)[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
    return joined, last


def rows_of_tiles(num_rows: int) -> int:
    """Return the number of rows for which a launch on a device chooses its tiles.

    In batch-invariant mode it is a constant, so that all launches have the same tiles.
    """
    return _MANY_ROWS if fixed_order() else num_rows


def splits_of(
    steps: int, tiles: int, tile_size: int, most: int, num_partials: int = NUM_PARTIALS
) -> tuple[int, int]:
    """Return the number of parts of each sum, and the steps of a part, at least one.

    Args:
        steps: steps of each sum.
        tiles: number of sums in the launch.
        tile_size: values of a tile.
        most: maximum number of parts.
        num_partials: number of values that the scratch memory holds.
    """
    max_splits = min(most, num_partials // (tiles * tile_size)) if tiles <= NUM_COUNTERS else 1
    # so that every part has work
    steps_of_part = -(-steps // max(1, max_splits))
    return -(-steps // steps_of_part), steps_of_part


def new_scratch(like: Tensor, num_partials: int = NUM_PARTIALS) -> Tensor:
    """Allocate scratch memory for launches that run one at a time.

    Args:
        like: float32 tensor on the device.

    Returns:
        float32 [NUM_COUNTERS + num_partials]. Counters are float32 like the sums, so that one
        tensor of any library holds both. They are zero between launches.
    """
    return like.new_zeros([NUM_COUNTERS + num_partials])


def scratch_beside(like: Tensor, operator: str, num_partials: int = NUM_PARTIALS) -> Tensor | None:
    """Return the scratch memory of an operator on a device, which the first call allocates.

    Returns:
        The memory. None in a capture before any launch outside of a capture: the memory would
        belong to the graph, and each replay would write zeros to it.
    """
    api = api_for_type(type(like))
    # interpreted kernels also run on memory without a device number, such as a CPU's
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


def _clear_counters() -> None:
    """Reset all counters. Those of a launch that ended midway would make all later sums wrong."""
    for scratch in SCRATCH.values():
        scratch.zero_()


ON_FAILURE.append(_clear_counters)
