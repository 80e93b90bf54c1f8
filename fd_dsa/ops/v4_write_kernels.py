"""Keys, compressed entries and states of a DeepSeek-V4 layer on a device.

Before attention one launch writes the keys of the step's tokens, and one the entries that the step
finishes. After attention one launch keeps the newest keys in the rings of windows, and the newest
sources in the states. So a token reads a key of its own step from the step's keys, an older one
from the ring.

A source has float32 values and gates of its halves, of the main compressor and then of the
indexer's: [values of each half, gates of each half] each. Keys and entries are float32, bfloat16,
or FP8 records (uint8, `v4_records.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.cache_formats import v4_record_bytes
from fd_dsa.ops.dense_kernels import empty_beside
from fd_dsa.ops.device_functions import stored, widened
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.v4_records import store_index_record, store_record
from fd_dsa.ops.v4_rotation import load_angles, rotate_rows
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

# sources that are loaded at a time
_TILE = 8
_BLOCK = tl.constexpr(1024)


class Norm(NamedTuple):
    """Weight of an RMSNorm, float32 [width], and the term added to the mean square."""

    weight: Tensor
    epsilon: float


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


@triton.jit
def _normed(
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
def _store_key(x, out_ptr, row, WIDTH: tl.constexpr, ROPE: tl.constexpr, ROW: tl.constexpr):
    """Store a key or entry `x` [PADDED] as row `row` of a pool with ROW elements a row."""
    out_ptr += row * ROW
    if out_ptr.dtype.element_ty == tl.uint8:
        store_record(x, out_ptr, WIDTH, ROPE)
    else:
        channel = tl.arange(0, x.shape[0])
        tl.store(out_ptr + channel, stored(x, out_ptr), mask=channel < WIDTH)


@step_kernel(strided=("x_ptr",), waits=True)
def write_keys_kernel(
    x_ptr,
    weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    out_ptr,
    stride,
    epsilon,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    ROW: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Norm and rotate the key of token `program 0`."""
    wait_for_inputs()
    start_next()
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PADDED)
    x = widened(tl.load(x_ptr + token * stride + channel, mask=channel < WIDTH, other=0.0))
    position = tl.load(positions_ptr + token)
    x = _normed(x, weight_ptr, epsilon, cos_sin_ptr, position, WIDTH, ROPE, PADDED)
    _store_key(x, out_ptr, token, WIDTH, ROPE, ROW)


def write_keys(
    x: Tensor, norm: Norm, cos_sin: Tensor, positions: Tensor, *, as_records: bool = False
) -> Tensor:
    """Return the normed and rotated keys of a step's tokens.

    Args:
        x: [num_tokens, width]; there may be gaps between rows.
        cos_sin: float32 [num_positions, rotated channels]; cos, then sin.
        positions: int32 [num_tokens].
        as_records: return FP8 records; a key then has a power of two of values.

    Returns:
        [num_tokens, width] of the type of `x`, or uint8 [num_tokens, bytes of a record].
    """
    (tokens, width), rope = x.shape, cos_sin.shape[1]
    row = v4_record_bytes(width, rope) if as_records else width
    out = empty_beside(x, tokens, row, dtype="uint8" if as_records else None)
    if tokens:
        write_keys_kernel[(tokens,)](
            x, norm.weight, cos_sin, positions, out, x.strides[0], norm.epsilon, WIDTH=width,
            ROPE=rope, ROW=row, PADDED=next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _pool(
    sources_ptr, states_ptr, gates_ptr, work, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    SOURCE: tl.constexpr, SOURCE_STRIDE: tl.constexpr, HALVES: tl.constexpr, RATIO: tl.constexpr,
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
        own_token = (token - (POOL - 1) + number).to(tl.int64)
        own = sources_ptr + own_token[:, None] * SOURCE_STRIDE + at
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


@step_kernel(strided=("sources_ptr",), waits=True)
def pool_entries_kernel(
    sources_ptr,
    states_ptr,
    plan_ptr,
    rows_ptr,
    gates_ptr,
    norm_ptr,
    entries_ptr,
    index_gates_ptr,
    index_norm_ptr,
    index_entries_ptr,
    cos_sin_ptr,
    epsilon,
    WIDTH: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    SOURCE: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
    HALVES: tl.constexpr,
    RATIO: tl.constexpr,
    POOL: tl.constexpr,
    RING: tl.constexpr,
    ROPE: tl.constexpr,
    ROW: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    INDEX_PADDED: tl.constexpr,
):
    """Make entry `program 0` of the plan, of the main compressor or (`program 1`) the indexer's."""
    wait_for_inputs()
    start_next()
    plan = plan_ptr + tl.program_id(0) * 4
    token = tl.load(plan)
    if token >= 0:
        position = tl.load(plan + 2)
        work = (token, tl.load(plan + 1), position, tl.load(plan + 3))
        row, begin = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64), position + 1 - RATIO
        if tl.program_id(1) == 0:
            x = _pool(
                sources_ptr, states_ptr, gates_ptr, work, 0, WIDTH, SOURCE, SOURCE_STRIDE, HALVES,
                RATIO, POOL, RING, TILE, PADDED,
            )  # fmt: skip
            x = _normed(x, norm_ptr, epsilon, cos_sin_ptr, begin, WIDTH, ROPE, PADDED)
            _store_key(x, entries_ptr, row, WIDTH, ROPE, ROW)
        elif index_entries_ptr is not None:
            # other names than above, because a name has one type
            index_x = _pool(
                sources_ptr, states_ptr, index_gates_ptr, work, 2 * HALVES * WIDTH, INDEX_WIDTH,
                SOURCE, SOURCE_STRIDE, HALVES, RATIO, POOL, RING, TILE, INDEX_PADDED,
            )  # fmt: skip
            index_x = _normed(
                index_x, index_norm_ptr, epsilon, cos_sin_ptr, begin, INDEX_WIDTH, ROPE,
                INDEX_PADDED,
            )  # fmt: skip
            if index_entries_ptr.dtype.element_ty == tl.uint8:
                store_index_record(index_x, index_entries_ptr, row, INDEX_WIDTH, PER_BLOCK)
            else:
                _store_key(index_x, index_entries_ptr, row, INDEX_WIDTH, ROPE, INDEX_WIDTH)


def pool_entries(
    sources: Tensor,
    states: Tensor,
    plan: Plan,
    main: Pooling,
    index: Pooling | None,
    cos_sin: Tensor,
    epsilon: float,
) -> None:
    """Write the entries that a step finishes to their pools, one launch.

    Args:
        sources: float32 [num_tokens, values of a source]; there may be gaps between rows.
        states: float32 [num_rows * plan.ring, values of a source], sources of earlier steps.
        main, index: both compressors; an HCA layer has no `index`.
        cos_sin: as for `write_keys`. An entry is rotated as the first token of its own group.
        epsilon: term added to mean squares.
    """
    if not plan.num_entries:
        return
    width, index_width = main.norm.shape[0], 0 if index is None else index.norm.shape[0]
    _, per_block, row = main.entries.shape
    pool_entries_kernel[plan.num_entries, 1 if index is None else 2](
        sources, states, plan.entries, plan.rows, *main, *(index or (None, None, None)), cos_sin,
        epsilon, WIDTH=width, INDEX_WIDTH=index_width, SOURCE=sources.shape[1],
        SOURCE_STRIDE=sources.strides[0], HALVES=plan.pool // plan.ratio, RATIO=plan.ratio,
        POOL=plan.pool, RING=plan.ring,
        ROPE=cos_sin.shape[1], ROW=row, PER_BLOCK=per_block, TILE=_TILE,
        PADDED=next_power_of_2(width), INDEX_PADDED=next_power_of_2(index_width or 2), num_warps=4,
    )  # fmt: skip


@step_kernel(strided=("sources_ptr",), waits=True)
def keep_step_kernel(
    keys_ptr,
    places_ptr,
    ring_ptr,
    sources_ptr,
    kept_ptr,
    states_ptr,
    num_tokens,
    num_kept,
    WIDTH: tl.constexpr,
    SOURCE: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
    RING: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Copy the key of token `program 0` to its ring, and source `program 0` of the plan."""
    wait_for_inputs()
    start_next()
    index = tl.program_id(0)
    if index < num_tokens:
        channel = tl.arange(0, PADDED)
        # a vector, because some versions of the interpreter refuse masks of a scalar and a vector
        place = tl.load(places_ptr + index).to(tl.int64) + tl.zeros([PADDED], tl.int64)
        mask = (channel < WIDTH) & (place >= 0)
        key = tl.load(keys_ptr + index.to(tl.int64) * WIDTH + channel, mask=mask, other=0.0)
        tl.store(ring_ptr + place * WIDTH + channel, key, mask=mask)
    if states_ptr is not None:
        plan = kept_ptr + 4 * tl.minimum(index, num_kept - 1)
        token = tl.load(plan).to(tl.int64)
        # without a source to keep no block is copied
        size = tl.where((index < num_kept) & (token >= 0), SOURCE, 0)
        for first in range(0, size, _BLOCK):
            at = first + tl.arange(0, _BLOCK)
            slot = tl.load(plan + 1) * RING + tl.load(plan + 2) % RING
            value = tl.load(sources_ptr + token * SOURCE_STRIDE + at, mask=at < SOURCE, other=0.0)
            tl.store(states_ptr + slot.to(tl.int64) * SOURCE + at, value, mask=at < SOURCE)


def keep_step(
    keys: Tensor,
    places: Tensor,
    ring: Tensor,
    sources: Tensor | None = None,
    plan: Plan | None = None,
    states: Tensor | None = None,
) -> None:
    """Keep the newest keys and sources of a step for later steps, one launch after attention.

    Args:
        keys: [num_tokens, width or bytes of a record], result of `write_keys`.
        places: int32 [num_tokens or more], row of each key in `ring`, -1 = not kept.
        ring: [num_rows * ring length, width or bytes of a record].
        sources, plan, states: as for `pool_entries`; None in a layer without a compressor.
    """
    (tokens, width), kept = keys.shape, 0 if plan is None else plan.num_kept
    if tokens:
        keep_step_kernel[(max(tokens, kept),)](
            keys, places, ring, sources, None if plan is None else plan.kept, states, tokens, kept,
            WIDTH=width, SOURCE=1 if sources is None else sources.shape[1],
            SOURCE_STRIDE=1 if sources is None else sources.strides[0],
            RING=1 if plan is None else plan.ring, PADDED=next_power_of_2(width), num_warps=4,
        )  # fmt: skip
