"""Keys, compressed entries and states of a DeepSeek-V4 layer on a device.

Before attention one launch norms the queries' latents and the keys of the step's tokens, and writes
the entries that the step finishes. A token reads a key of its own step from the step's keys, an
older one from the ring.

The newest keys are kept in the rings of windows, and the newest sources in the states. In a step of
decode tokens the same launch keeps them: rings and states have a place for each draft in addition,
so no new value takes the place of one that the step reads. In a step with prompts a second launch
keeps them after attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fd_dsa.cache_formats import v4_record_bytes
from fd_dsa.ops.dense_kernels import GROUP, empty_beside, empty_norm, store_norm
from fd_dsa.ops.device_functions import widened
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.v4_entries import Compression, Plan, Pooling, normed_row, pooled_row, store_key
from fd_dsa.ops.v4_records import store_index_record
from fd_dsa.tensor import Normed, Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

# sources that are loaded at a time
_TILE = 8
_BLOCK = tl.constexpr(1024)
# compressors of a layer with windows only; kernels read no tensor that is None
_NONE: Any = None
_NO_POOLING = Pooling(_NONE, _NONE, _NONE)
_NO_ENTRIES = Compression(_NONE, _NONE, Plan(_NONE, _NONE, _NONE, 0, 0, 1, 1, 1), _NO_POOLING)


class Ring(NamedTuple):
    """Ring of a layer, and the places of a step's keys.

    Attributes:
        places: int32 [num_tokens or more], row of each key in the ring, -1 = not kept.
        keys: [num_rows * ring length, width or bytes of a record].
    """

    places: Tensor
    keys: Tensor


@triton.jit
def _keep_source(
    sources_ptr, STRIDE: tl.constexpr, kept_ptr, states_ptr, index, num_kept,
    SOURCE: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Copy the source of row `index` of a plan to the states, if there is one."""
    plan = kept_ptr + 4 * tl.minimum(index, num_kept - 1)
    token = tl.load(plan).to(tl.int64)
    # without a source to keep no block is copied
    size = tl.where((index < num_kept) & (token >= 0), SOURCE, 0)
    for first in range(0, size, _BLOCK):
        at = first + tl.arange(0, _BLOCK)
        slot = tl.load(plan + 1) * RING + tl.load(plan + 2) % RING
        value = tl.load(sources_ptr + token * STRIDE + at, mask=at < SOURCE, other=0.0)
        tl.store(states_ptr + slot.to(tl.int64) * SOURCE + at, value, mask=at < SOURCE)


@step_kernel(strided=("x_ptr", "sources_ptr"), waits=True)
def write_step_kernel(
    x_ptr,
    latent_norm_ptr,
    latents_ptr,
    codes_ptr,
    scales_ptr,
    key_norm_ptr,
    cos_sin_ptr,
    positions_ptr,
    keys_ptr,
    places_ptr,
    ring_ptr,
    sources_ptr,
    states_ptr,
    plan_ptr,
    rows_ptr,
    kept_ptr,
    gates_ptr,
    norm_ptr,
    entries_ptr,
    index_gates_ptr,
    index_norm_ptr,
    index_entries_ptr,
    num_tokens,
    num_entries,
    num_kept,
    scale_stride,
    epsilon,
    STRIDE: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    SOURCE: tl.constexpr,
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
    """Do job `program 0`: the entries of a plan, those of the indexer, keys, latents, kept sources.

    Without `sources_ptr` the layer has no entries, and without `index_gates_ptr` no indexer.
    Without `ring_ptr` the launch keeps no keys and no sources.
    """
    wait_for_inputs()
    start_next()
    job, compressors = tl.program_id(0), 0
    if sources_ptr is not None:
        compressors = 1 if index_gates_ptr is None else 2
        if job < compressors * num_entries:
            number = job % num_entries
            plan = plan_ptr + number * 4
            token = tl.load(plan)
            if token >= 0:
                position = tl.load(plan + 2)
                work = (token, tl.load(plan + 1), position, tl.load(plan + 3))
                row, begin = tl.load(rows_ptr + number).to(tl.int64), position + 1 - RATIO
                if job < num_entries:
                    x = pooled_row(
                        sources_ptr, SOURCE_STRIDE, states_ptr, gates_ptr, work, 0, WIDTH, SOURCE,
                        HALVES, RATIO, POOL, RING, TILE, PADDED,
                    )  # fmt: skip
                    x = normed_row(x, norm_ptr, epsilon, cos_sin_ptr, begin, WIDTH, ROPE, PADDED)
                    store_key(x, entries_ptr, row, WIDTH, ROPE, ROW)
                elif index_gates_ptr is not None:
                    # other names than above, because a name has one type
                    index_x = pooled_row(
                        sources_ptr, SOURCE_STRIDE, states_ptr, index_gates_ptr, work,
                        2 * HALVES * WIDTH, INDEX_WIDTH, SOURCE, HALVES, RATIO, POOL, RING, TILE,
                        INDEX_PADDED,
                    )  # fmt: skip
                    index_x = normed_row(
                        index_x, index_norm_ptr, epsilon, cos_sin_ptr, begin, INDEX_WIDTH, ROPE,
                        INDEX_PADDED,
                    )  # fmt: skip
                    if index_entries_ptr.dtype.element_ty == tl.uint8:
                        store_index_record(index_x, index_entries_ptr, row, INDEX_WIDTH, PER_BLOCK)
                    else:
                        store_key(index_x, index_entries_ptr, row, INDEX_WIDTH, ROPE, INDEX_WIDTH)
    job -= compressors * num_entries
    if (job >= 0) & (job < num_tokens):
        own = job.to(tl.int64)
        channel = tl.arange(0, PADDED)
        key_ptr = x_ptr + own * STRIDE + RANK + channel
        key = widened(tl.load(key_ptr, mask=channel < WIDTH, other=0.0))
        key_position = tl.load(positions_ptr + own)
        key = normed_row(key, key_norm_ptr, epsilon, cos_sin_ptr, key_position, WIDTH, ROPE, PADDED)
        store_key(key, keys_ptr, own, WIDTH, ROPE, ROW)
        if ring_ptr is not None:
            place = tl.load(places_ptr + own).to(tl.int64)
            if place >= 0:
                store_key(key, ring_ptr, place, WIDTH, ROPE, ROW)
    job -= num_tokens
    if (job >= 0) & (job < num_tokens):
        of_row = job.to(tl.int64)
        column = tl.arange(0, RANK_PADDED)
        inside = column < RANK
        latent = widened(tl.load(x_ptr + of_row * STRIDE + column, mask=inside, other=0.0))
        weight = tl.load(latent_norm_ptr + column, mask=inside, other=0.0)
        store_norm(
            latent, weight, epsilon, of_row, latents_ptr, codes_ptr, scales_ptr, scale_stride, RANK,
            RANK_PADDED, ROUND_SCALES,
        )  # fmt: skip
    if ring_ptr is not None and sources_ptr is not None:
        job -= num_tokens
        if job >= 0:
            _keep_source(
                sources_ptr, SOURCE_STRIDE, kept_ptr, states_ptr, job, num_kept, SOURCE, RING
            )


def write_step(
    projected: Tensor,
    latent_weight: Tensor,
    key_weight: Tensor,
    epsilon: float,
    cos_sin: Tensor,
    positions: Tensor,
    compression: Compression | None = None,
    kept: Ring | None = None,
    *,
    round_scales: bool | None = None,
    as_records: bool = False,
) -> tuple[Tensor | Normed, Tensor]:
    """Norm the latents and keys of a step's tokens, and write the entries that the step finishes.

    Args:
        projected: [num_tokens, rank + width], latents of the queries, then keys; there may be gaps
            between rows.
        latent_weight, key_weight: float32 [rank] and [width], weights of their RMSNorms.
        epsilon: term added to the mean squares of both and of entries.
        cos_sin: float32 [num_positions, rotated channels]; cos, then sin. An entry is rotated as
            the first token of its own group.
        positions: int32 [num_tokens or more].
        compression: compressors of the layer; None = it has windows only.
        kept: ring that keeps the keys. The states of `compression` then keep sources, too. This
            is allowed if no row has more new tokens than its drafts plus one. None keeps neither.
        round_scales: as for DeviceNorm, of the latents.
        as_records: make keys FP8 records; a key then has a power of two of values.

    Returns:
        Latents [num_tokens, rank], with `round_scales` also in FP8. Keys [num_tokens, width] of the
        type of `projected`, or uint8 [num_tokens, bytes of a record].

    Cost: one launch.
    """
    tokens, rank, width = projected.shape[0], latent_weight.shape[0], key_weight.shape[0]
    rope = cos_sin.shape[1]
    row = v4_record_bytes(width, rope) if as_records else width
    normed, (latents, codes, scales, scale_stride) = empty_norm(projected, rank, round_scales)
    keys = empty_beside(projected, tokens, row, dtype="uint8" if as_records else None)
    compression = compression or _NO_ENTRIES
    sources, states, plan, main, index = compression
    num_jobs = plan.num_entries * (1 if index is None else 2) + 2 * tokens
    num_jobs += plan.num_kept if kept else 0
    if tokens:
        write_step_kernel[(num_jobs,)](
            projected, latent_weight, latents, codes, scales, key_weight, cos_sin,
            positions, keys, *(kept or (None, None)), sources, states, plan.entries, plan.rows,
            plan.kept, *main, *(index or _NO_POOLING), tokens, plan.num_entries, plan.num_kept,
            scale_stride, epsilon, STRIDE=projected.strides[0], RANK=rank,
            RANK_PADDED=max(GROUP, next_power_of_2(rank)), ROUND_SCALES=bool(round_scales),
            WIDTH=width, ROPE=rope, ROW=row, TILE=_TILE, PADDED=next_power_of_2(width),
            num_warps=4, **_sizes(compression),
        )  # fmt: skip
    return normed, keys


def _sizes(compression: Compression) -> dict[str, int]:
    """Return the constants of `write_step_kernel` for the compressors of a layer."""
    sources, _, plan, main, index = compression
    width, has_entries = 0 if index is None else index.norm.shape[0], compression is not _NO_ENTRIES
    return {
        "INDEX_WIDTH": width,
        "INDEX_PADDED": next_power_of_2(width or 2),
        "SOURCE": sources.shape[1] if has_entries else 1,
        "SOURCE_STRIDE": sources.strides[0] if has_entries else 1,
        "HALVES": plan.pool // plan.ratio,
        "RATIO": plan.ratio,
        "POOL": plan.pool,
        "RING": plan.ring,
        "PER_BLOCK": main.entries.shape[1] if has_entries else 1,
    }


@step_kernel(strided=("sources_ptr",), waits=True)
def keep_step_kernel(
    keys_ptr,
    places_ptr,
    snapshot_places_ptr,
    ring_ptr,
    sources_ptr,
    kept_ptr,
    states_ptr,
    num_tokens,
    num_kept,
    SOURCE_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    SOURCE: tl.constexpr,
    RING: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Copy the key of token `program 0` to its rings, and source `program 0` of the plan."""
    wait_for_inputs()
    start_next()
    index = tl.program_id(0)
    if index < num_tokens:
        channel = tl.arange(0, PADDED)
        # vectors, because some versions of the interpreter refuse masks of a scalar and a vector
        place = tl.load(places_ptr + index).to(tl.int64) + tl.zeros([PADDED], tl.int64)
        inside, kept, other = channel < WIDTH, place >= 0, place
        if snapshot_places_ptr is not None:
            other = tl.load(snapshot_places_ptr + index).to(tl.int64) + tl.zeros([PADDED], tl.int64)
            kept = kept | (other >= 0)
        own = keys_ptr + index.to(tl.int64) * WIDTH + channel
        key = tl.load(own, mask=inside & kept, other=0.0)
        tl.store(ring_ptr + place * WIDTH + channel, key, mask=inside & (place >= 0))
        if snapshot_places_ptr is not None:
            tl.store(ring_ptr + other * WIDTH + channel, key, mask=inside & (other >= 0))
    if states_ptr is not None:
        _keep_source(
            sources_ptr, SOURCE_STRIDE, kept_ptr, states_ptr, index, num_kept, SOURCE, RING
        )


def keep_step(
    keys: Tensor,
    kept: Ring,
    compression: Compression | None = None,
    snapshot_places: Tensor | None = None,
) -> None:
    """Copy the newest keys and sources of a step to rings and states, after attention.

    Args:
        keys: [num_tokens, width or bytes of a record], result of `write_step`.
        kept, compression: as for `write_step`, which kept nothing.
        snapshot_places: int32 [num_tokens or more], row of each key in the ring of a snapshot, or
            -1; left out if the step writes no snapshots.

    Cost: one launch.
    """
    compression, (tokens, width) = compression or _NO_ENTRIES, keys.shape
    (sources, states, plan, *_), sizes = compression, _sizes(compression)
    if tokens:
        keep_step_kernel[(max(tokens, plan.num_kept),)](
            keys, kept.places, snapshot_places, kept.keys, sources, plan.kept, states, tokens,
            plan.num_kept, WIDTH=width, PADDED=next_power_of_2(width), num_warps=4,
            **{name: sizes[name] for name in ("SOURCE", "SOURCE_STRIDE", "RING")},
        )  # fmt: skip
