"""Kernels for dense, causal attention of prompts, with keys and values of every head.

A token with at most `index_topk` keys attends to all of them, so a selection is not needed. Keys of
192 and values of 128 cost a third of the 576 and 512 of the absorbed form. These dense tokens are
the tokens of prompt rows at positions below `index_topk`, so the device finds them from the lengths
of the rows. They see the keys of their windows, up to the last dense token of the row.

Source: the online softmax over tiles of keys is that of FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

from fd_dsa.ops.device_functions import (
    blocks_of,
    key_bounds,
    load_pairs,
    rotated,
    stored,
    to_bfloat16,
)
from fd_dsa.ops.head_gemm import store_heads
from fd_dsa.ops.mla.triton_kernel import latents_of, roped_of
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip


@triton.jit
def _dense_tokens(
    seq_lens_encoder_ptr, seq_lens_decoder_ptr, row, first_row, end_row, index_topk
):  # fmt: skip
    """Return the dense tokens and the cached tokens of each row of a group."""
    is_row = (row >= first_row) & (row < end_row)
    new = tl.load(seq_lens_encoder_ptr + row, mask=is_row, other=0)
    cached = tl.load(seq_lens_decoder_ptr + row, mask=is_row, other=0)
    return tl.maximum(tl.minimum(index_topk - cached, new), 0), cached


@triton.jit
def _keys(dense, cached):
    """Return the number of keys that the dense tokens of each row see."""
    return tl.where(dense > 0, cached + dense, 0)


@triton.jit
def _item(values, mine):
    """Return the value of the one row in the mask `mine`."""
    return tl.sum(tl.where(mine, values, 0))


@step_kernel(waits=True)
def gather_keys_kernel(
    cache_ptr,
    block_tables_ptr,
    seq_lens_encoder_ptr,
    seq_lens_decoder_ptr,
    latents_ptr,
    rope_ptr,
    first_row,
    end_row,
    index_topk,
    table_width,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gather KEYS keys of a group, from key KEYS * `program 0` on, as bfloat16.

    The keys of the rows are contiguous in the result. A table entry outside the cache gives zeros.
    The grid of a captured launch may reach places after the last key, which are not written.
    """
    wait_for_inputs()
    start_next()
    row = tl.arange(0, ROWS)
    dense, cached = _dense_tokens(
        seq_lens_encoder_ptr, seq_lens_decoder_ptr, row, first_row, end_row, index_topk
    )
    num_keys = _keys(dense, cached)
    ends = tl.cumsum(num_keys)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    live = key < tl.sum(num_keys)
    before = ends[None, :] <= key[:, None]
    # a row without keys has the end of the row before it
    start = tl.max(tl.where(before, ends[None, :], 0), 1)
    own = tl.sum(before.to(tl.int32), 1)
    position = key - start
    block = blocks_of(
        block_tables_ptr, own, position, live, table_width, num_blocks, BLOCK_SIZE
    )  # fmt: skip
    slot = (block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE)[:, None]
    exists = (block >= 0)[:, None]
    dim, rope_dim = tl.arange(0, RANK_PADDED)[None, :], tl.arange(0, ROPE)[None, :]
    inside = live[:, None] & (dim < RANK)
    x = latents_of(cache_ptr, slot, dim, exists & (dim < RANK), RANK, ROPE, FP8, tl.float32)
    out = key.to(tl.int64)[:, None]
    tl.store(latents_ptr + out * RANK + dim, to_bfloat16(x), mask=inside)
    x = roped_of(cache_ptr, slot, rope_dim, exists & (rope_dim >= 0), RANK, ROPE, FP8, tl.float32)
    tl.store(rope_ptr + out * ROPE + rope_dim, to_bfloat16(x), mask=live[:, None])


@step_kernel(waits=True)
def list_absorbed_kernel(
    seq_lens_encoder_ptr,
    seq_lens_decoder_ptr,
    seq_lens_this_time_ptr,
    tokens_ptr,
    batch_ids_ptr,
    left_ptr,
    count_ptr,
    num_rows,
    num_places,
    index_topk,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Fill PLACES places of the list of tokens that do not attend densely, see `list_absorbed`."""
    wait_for_inputs()
    start_next()
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    dense, cached = _dense_tokens(
        seq_lens_encoder_ptr, seq_lens_decoder_ptr, row, 0, num_rows, index_topk
    )
    absorbed = tl.load(seq_lens_this_time_ptr + row, mask=is_row, other=0) - dense
    ends = tl.cumsum(absorbed)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    own = tl.sum((ends[None, :] <= place[:, None]).to(tl.int32), 1)
    # a row has its dense tokens first
    token = place + tl.sum(tl.where(row[None, :] <= own[:, None], dense[None, :], 0), 1)
    live, inside = place < tl.sum(absorbed), place < num_places
    tl.store(tokens_ptr + place, tl.where(live, token, -1), mask=inside)
    tl.store(batch_ids_ptr + place, tl.where(live, own, -1), mask=inside)
    if tl.program_id(0) == 0:
        new = tl.load(seq_lens_encoder_ptr + row, mask=is_row, other=0)
        tl.store(left_ptr + row, new - dense, mask=is_row)
        if count_ptr is not None:
            tl.store(count_ptr, tl.sum(_keys(dense, cached)))


@triton.jit
def _tile(pointer, seen, WIDTH: tl.constexpr, PADDED: tl.constexpr, IS_EDGE: tl.constexpr):
    """Load bfloat16 [keys, PADDED] from rows at `pointer` [keys]."""
    column = tl.arange(0, PADDED)
    if IS_EDGE or PADDED != WIDTH:
        mask = seen[:, None] & (column < WIDTH)[None, :]
        x = tl.load(pointer[:, None] + column[None, :], mask=mask, other=0.0)
    else:
        x = tl.load(pointer[:, None] + column[None, :])
    return x


@triton.jit
def _attend_tile(
    q, q_rope, keys, start, end, bounds, head, heads, scale_log2, top, total, out,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUES: tl.constexpr, NOPE_PADDED: tl.constexpr,
    VALUES_PADDED: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """Add the keys from `start` on to the softmax. With IS_EDGE some of them are masked."""
    k_ptr, v_ptr, rope_ptr, first_key = keys
    key = start + tl.arange(0, BLOCK_COLUMNS)
    seen, place = key < end, (first_key + key).to(tl.int64)
    k = _tile(k_ptr + (place * heads + head) * NOPE, seen, NOPE, NOPE_PADDED, IS_EDGE)
    k_rope = _tile(rope_ptr + place * ROPE, seen, ROPE, ROPE, IS_EDGE)
    scores = tl.dot(q, tl.trans(k))
    scores = tl.dot(q_rope, tl.trans(k_rope), acc=scores)
    if IS_EDGE:
        begins, stops = bounds
        seen_by = (key[None, :] >= begins[:, None]) & (key[None, :] < stops[:, None])
        scores = tl.where(seen_by, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    finite_top = new_top
    if IS_EDGE:
        # 0 if a token has not seen a key, to avoid a difference of infinities
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(scores * scale_log2 - finite_top[:, None])
    shrink = tl.exp2(top - finite_top)
    total = total * shrink + tl.sum(weight, 1)
    v = _tile(v_ptr + (place * heads + head) * VALUES, seen, VALUES, VALUES_PADDED, IS_EDGE)
    out = tl.dot(to_bfloat16(weight), v, acc=out * shrink[:, None])
    return new_top, total, out


@step_kernel(waits=True)
def attend_prompts_kernel(
    q_ptr,
    cos_sin_ptr,
    k_ptr,
    v_ptr,
    rope_ptr,
    seq_lens_encoder_ptr,
    seq_lens_decoder_ptr,
    cu_seqlens_q_ptr,
    position_ids_ptr,
    offsets_ptr,
    key_starts_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    scales_stride,
    scale_log2,
    first_row,
    end_row,
    index_topk,
    NOPE: tl.constexpr,
    HALF: tl.constexpr,
    VALUES: tl.constexpr,
    NOPE_PADDED: tl.constexpr,
    VALUES_PADDED: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Attend for a tile of tokens of a row, for head `program 1`.

    Tiles with the most keys start first. The grid of a captured launch may have more tiles than the
    rows, and these neither read nor write.
    """
    wait_for_inputs()
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.arange(0, ROWS)
    dense, cached = _dense_tokens(
        seq_lens_encoder_ptr, seq_lens_decoder_ptr, row, first_row, end_row, index_topk
    )
    tiles = (dense + (BLOCK_ROWS - 1)) // BLOCK_ROWS
    ends = tl.cumsum(tiles)
    own = tl.sum((ends <= tile).to(tl.int32))
    mine = row == own
    num_keys = _keys(dense, cached)
    first_key = _item(tl.cumsum(num_keys) - num_keys, mine)
    count, dense_keys = _item(dense, mine), _item(num_keys, mine)
    first = (tile - _item(ends - tiles, mine)) * BLOCK_ROWS
    new = first + tl.arange(0, BLOCK_ROWS)
    live = new < count
    token = (tl.load(cu_seqlens_q_ptr + own, mask=own < end_row, other=0) + new).to(tl.int64)
    query = q_ptr + (token * heads + head) * (NOPE + 2 * HALF)
    q = _tile(query, live, NOPE, NOPE_PADDED, True)
    angle = (cos_sin_ptr + token * (2 * HALF))[:, None] + tl.arange(0, HALF)[None, :]
    cos = tl.load(angle, mask=live[:, None], other=0.0)
    sin = tl.load(angle + HALF, mask=live[:, None], other=0.0)
    a, b = load_pairs((query + NOPE)[:, None], live[:, None], HALF, True)
    # zeros, because a masked load may return any values
    a, b = tl.where(live[:, None], a, 0.0), tl.where(live[:, None], b, 0.0)
    a, b = rotated(a, b, cos, sin)
    q_rope = tl.reshape(tl.join(stored(a, q_ptr), stored(b, q_ptr)), [BLOCK_ROWS, 2 * HALF])

    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    out = tl.zeros([BLOCK_ROWS, VALUES_PADDED], tl.float32)
    keys = k_ptr, v_ptr, rope_ptr, first_key
    begins, stops = key_bounds(
        token, own, live, position_ids_ptr, offsets_ptr, key_starts_ptr, seq_lens_encoder_ptr
    )
    stops = tl.minimum(stops, dense_keys)
    bounds = begins, stops
    # first whole tiles of keys that all tokens see, then the other keys
    end = tl.max(stops)
    whole = tl.min(tl.where(live, stops, dense_keys)) // BLOCK_COLUMNS * BLOCK_COLUMNS
    whole = tl.where(tl.max(begins) > 0, 0, whole)
    for start in range(0, whole, BLOCK_COLUMNS):
        top, total, out = _attend_tile(
            q, q_rope, keys, start, end, bounds, head, heads, scale_log2, top, total, out,
            NOPE, 2 * HALF, VALUES, NOPE_PADDED, VALUES_PADDED, BLOCK_COLUMNS, False,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_COLUMNS):
        top, total, out = _attend_tile(
            q, q_rope, keys, start, end, bounds, head, heads, scale_log2, top, total, out,
            NOPE, 2 * HALF, VALUES, NOPE_PADDED, VALUES_PADDED, BLOCK_COLUMNS, True,
        )  # fmt: skip
    start_next()
    column = tl.arange(0, VALUES_PADDED)
    # zeros for a token without keys
    total = tl.where(total == 0.0, 1.0, total)
    store_heads(
        out / total[:, None], token, column, head, heads, live, column < VALUES,
        out_ptr, codes_ptr, scales_ptr, scales_stride, VALUES, ROUND_SCALES,
    )  # fmt: skip
