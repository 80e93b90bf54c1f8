"""Compressors of a DeepSeek-V4 layer on a device, and the functions that make its keys and entries.

A source has float32 values and gates of its halves, of the main compressor and then of the
indexer's: [values of each half, gates of each half] each. Keys and entries are float32, bfloat16,
or FP8 records (uint8, `v4_records.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.ops.device_functions import stored
from fd_dsa.ops.v4_records import store_record
from fd_dsa.ops.v4_rotation import load_angles, rotate_rows
from fd_dsa.tensor import Tensor

import triton  # isort: skip
import triton.language as tl  # isort: skip


class Pooling(NamedTuple):
    """Weights of one compressor, and the pool of its entries.

    Attributes:
        gates: float32 [ratio * halves * width], added to the gates by the place of a token.
        norm: float32 [width].
        entries: [num_blocks, entries of a block, width or bytes of a record].
    """

    gates: Tensor
    norm: Tensor
    entries: Tensor


class Plan(NamedTuple):
    """Work of a step for one ratio, see `fd_dsa.v4_prepare.V4Arrays`.

    Attributes:
        entries: int32 [capacity, 4], token, row, position and sources from the states; token -1 =
            no work.
        rows: int32 [capacity], row of each entry in the pool.
        kept: int32 [capacity, 4], tokens whose sources are kept; token -1 = no work.
        num_entries, num_kept: rows of both that are read.
        ratio, pool: tokens of an entry, and tokens that it pools.
        ring: sources of a row in the states, at least `pool`.
    """

    entries: Tensor
    rows: Tensor
    kept: Tensor
    num_entries: int
    num_kept: int
    ratio: int
    pool: int
    ring: int


class Compression(NamedTuple):
    """Compressors of a layer in a step.

    Attributes:
        sources: float32 [num_tokens, values of a source]; there may be gaps between rows.
        states: float32 [num_rows * plan.ring, values of a source], sources of earlier steps.
        plan: work of the step.
        main, of_index: both compressors; an HCA layer has only the first.
    """

    sources: Tensor
    states: Tensor
    plan: Plan
    main: Pooling
    of_index: Pooling | None = None


@triton.jit
def normed_row(
    x, weight_ptr, epsilon, cos_sin_ptr, position, WIDTH: tl.constexpr, ROPE: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Norm and rotate a row `x` [PADDED]."""
    channel = tl.arange(0, PADDED)
    inside = channel < WIDTH
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    cos, sin = load_angles(cos_sin_ptr, position, WIDTH, ROPE, PADDED)
    x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / WIDTH + epsilon)) * weight
    return tl.reshape(rotate_rows(x[None, :], cos, sin), [PADDED])


@triton.jit
def store_key(x, out_ptr, row, WIDTH: tl.constexpr, ROPE: tl.constexpr, ROW: tl.constexpr):
    """Store a key or entry `x` [PADDED] as row `row` of a pool with ROW elements a row."""
    out_ptr += row * ROW
    if out_ptr.dtype.element_ty == tl.uint8:
        store_record(x, out_ptr, WIDTH, ROPE)
    else:
        channel = tl.arange(0, x.shape[0])
        tl.store(out_ptr + channel, stored(x, out_ptr), mask=channel < WIDTH)


@triton.jit
def pooled_row(
    sources_ptr, STRIDE: tl.constexpr, states_ptr, gates_ptr, work, FIRST: tl.constexpr,
    WIDTH: tl.constexpr, SOURCE: tl.constexpr, HALVES: tl.constexpr, RATIO: tl.constexpr,
    POOL: tl.constexpr, RING: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return the gated mean of an entry's sources [PADDED], a softmax for each channel."""
    token, row, position, from_states = work
    channel = tl.arange(0, PADDED)
    top = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    mean = tl.zeros([PADDED], tl.float32)
    for first in range(0, POOL, TILE):
        number = first + tl.arange(0, TILE)
        source = position - (POOL - 1) + number
        exists = ((source >= 0) & (number < POOL))[:, None] & (channel < WIDTH)[None, :]
        # the first half of the sources of an entry with halves uses their first half
        half = number // RATIO if HALVES == 2 else number * 0
        is_kept = (number < from_states)[:, None]
        at = FIRST + (half * WIDTH)[:, None] + channel[None, :]
        kept = states_ptr + (row * RING + source % RING).to(tl.int64)[:, None] * SOURCE + at
        own = sources_ptr + (token - (POOL - 1) + number).to(tl.int64)[:, None] * STRIDE + at
        old, new = exists & is_kept, exists & (is_kept == 0)
        value = tl.load(kept, mask=old, other=0.0) + tl.load(own, mask=new, other=0.0)
        kept += HALVES * WIDTH
        own += HALVES * WIDTH
        gate = tl.load(kept, mask=old, other=0.0) + tl.load(own, mask=new, other=0.0)
        place = (source % RATIO * HALVES + half)[:, None] * WIDTH + channel[None, :]
        gate += tl.load(gates_ptr + place, mask=exists, other=0.0)
        gate = tl.where(exists, gate, float("-inf"))
        new_top = tl.maximum(top, tl.max(gate, axis=0))
        # 0 if no source has existed so far, to avoid a difference of infinities
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weight = tl.exp(top - base), tl.exp(gate - base[None, :])
        total = total * shrink + tl.sum(weight, axis=0)
        mean = mean * shrink + tl.sum(weight * value, axis=0)
        top = new_top
    return mean / tl.where(total == 0.0, 1.0, total)
