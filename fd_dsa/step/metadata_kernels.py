"""Triton kernels for the metadata of a step, one launch of one of them a step.

In a decode-only step each lane takes a row and writes its few tokens where the rows before it end,
so nothing is searched and the block-table entry is on its way while the lengths are still being
summed. With prefill rows each lane takes a token and finds its row by counting the rows that end at
or before it, so a long chunk is spread over many programs.

There is no barrier inside a launch, so every program sums the row lengths itself. Shapes, types and
values of what is written are those of `ForwardMeta`.

Source: PaddlePaddle/FastDeploy #7367 (positions and slots) and #7598 (windows), whose kernels give
one thread to a row; the windows here reach back over cached prefixes.
"""

from __future__ import annotations

from fd_dsa.triton_runtime import paddle_jit

import triton
import triton.language as tl

_NUMBERS = (
    "num_rows",
    "num_padded_rows",
    "num_padded_tokens",
    "row_stride",
    "num_columns",
    "last_block",
)
# a decode-only step does not read the first
_INPUTS = (
    "seq_lens_encoder_ptr",
    "seq_lens_decoder_ptr",
    "seq_lens_this_time_ptr",
    "block_tables_ptr",
)


@triton.jit
def _lengths(seq_lens_this_time_ptr, rows, num_rows, num_padded_tokens):
    """Load the tokens of each row within 0..num_padded_tokens, 0 past the last row."""
    lengths = tl.load(seq_lens_this_time_ptr + rows, mask=rows < num_rows, other=0)
    return tl.minimum(tl.maximum(lengths, 0), num_padded_tokens)


@triton.jit
def _slots(tables, rows, positions, live, BLOCK_SIZE: tl.constexpr):
    """Return the cache slot of each position, -1 if the table has no valid block for it.

    `tables`: address of the block tables, distance of two rows, number of columns, and last block
    of the cache.
    """
    block_tables_ptr, row_stride, num_columns, last_block = tables
    columns = positions // BLOCK_SIZE
    live = live & (positions >= 0) & (columns < num_columns)
    entries = block_tables_ptr + rows.to(tl.int64) * row_stride + columns
    blocks = tl.load(entries, mask=live, other=-1)
    slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    return tl.where((blocks >= 0) & (blocks <= last_block), slots, -1)


@triton.jit
def _store_tokens(outputs, int32_ptr, tokens, rows, positions, slots, mask):
    """Store row, position (int32 too, if there is a buffer) and slot of each token."""
    batch_id_per_token_ptr, position_ids_ptr, slot_mapping_ptr = outputs
    tl.store(batch_id_per_token_ptr + tokens, rows, mask)
    tl.store(position_ids_ptr + tokens, positions.to(tl.int64), mask)
    if int32_ptr is not None:
        tl.store(int32_ptr + tokens, positions, mask)
    tl.store(slot_mapping_ptr + tokens, slots, mask)


@paddle_jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INPUTS[1:])
def decode_step_metadata_kernel(
    seq_lens_decoder_ptr,
    seq_lens_this_time_ptr,
    block_tables_ptr,
    batch_id_per_token_ptr,
    position_ids_ptr,
    position_ids_int32_ptr,
    slot_mapping_ptr,
    cu_seqlens_q_ptr,
    num_rows,
    num_padded_rows,
    num_padded_tokens,
    row_stride,
    num_columns,
    last_block,
    BLOCK_SIZE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    NUM_ROW_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write rows [TILE * program, TILE * (program + 1)), and padding in that range of tokens."""
    tables = (block_tables_ptr, row_stride, num_columns, last_block)
    # Triton 3.3 takes no None in a tuple
    int32_ptr = position_ids_int32_ptr
    outputs = (batch_id_per_token_ptr, position_ids_ptr, slot_mapping_ptr)
    first = tl.program_id(0) * TILE
    rows = first + tl.arange(0, TILE)
    lengths = _lengths(seq_lens_this_time_ptr, rows, num_rows, num_padded_tokens)
    cached = tl.load(seq_lens_decoder_ptr + rows, rows < num_rows, other=0)
    slots = _slots(tables, rows, cached, lengths > 0, BLOCK_SIZE)
    before = 0
    num_tokens = 0
    for tile in range(NUM_ROW_TILES):
        others = tile * ROW_TILE + tl.arange(0, ROW_TILE)
        counts = _lengths(seq_lens_this_time_ptr, others, num_rows, num_padded_tokens)
        before += tl.sum(tl.where(others < first, counts, 0))
        num_tokens += tl.sum(counts)
    ends = before + tl.cumsum(lengths)
    starts = ends - lengths

    exists = rows < num_padded_rows
    tl.store(cu_seqlens_q_ptr + rows, 0, rows == 0)
    tl.store(cu_seqlens_q_ptr + rows + 1, ends, exists)

    written = (lengths > 0) & (starts >= 0) & (starts < num_padded_tokens)
    _store_tokens(outputs, int32_ptr, starts, rows, cached, slots, written)
    for draft in range(1, tl.max(lengths)):
        tokens = starts + draft
        positions = cached + draft
        written = (lengths > draft) & (tokens >= 0) & (tokens < num_padded_tokens)
        slots = _slots(tables, rows, positions, written, BLOCK_SIZE)
        _store_tokens(outputs, int32_ptr, tokens, rows, positions, slots, written)

    tokens = first + tl.arange(0, TILE)
    padding = (tokens >= num_tokens) & (tokens < num_padded_tokens)
    zeros = tl.zeros((TILE,), tl.int32)
    _store_tokens(outputs, int32_ptr, tokens, zeros - 1, zeros, zeros - 1, padding)


@paddle_jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INPUTS)
def mixed_step_metadata_kernel(
    seq_lens_encoder_ptr,
    seq_lens_decoder_ptr,
    seq_lens_this_time_ptr,
    block_tables_ptr,
    batch_id_per_token_ptr,
    position_ids_ptr,
    position_ids_int32_ptr,
    slot_mapping_ptr,
    cu_seqlens_q_ptr,
    indexer_attn_mask_offsets_ptr,
    cu_seqlens_kg_ptr,
    num_rows,
    num_padded_rows,
    num_padded_tokens,
    row_stride,
    num_columns,
    last_block,
    BLOCK_SIZE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    NUM_ROW_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write tokens [TILE * program, TILE * (program + 1)), and in the first program all rows."""
    tables = (block_tables_ptr, row_stride, num_columns, last_block)
    # Triton 3.3 takes no None in a tuple
    int32_ptr = position_ids_int32_ptr
    outputs = (batch_id_per_token_ptr, position_ids_ptr, slot_mapping_ptr)
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token_rows = tl.zeros((TILE,), tl.int32)
    # position of a token = its index + shift of its row
    shifts = tl.zeros((TILE,), tl.int32)
    # where the row's gathered keys start; -1 for a decode row
    windows = tl.full((TILE,), -1, tl.int32)
    num_tokens = 0
    num_keys = 0
    for tile in range(NUM_ROW_TILES):
        rows = tile * ROW_TILE + tl.arange(0, ROW_TILE)
        lengths = _lengths(seq_lens_this_time_ptr, rows, num_rows, num_padded_tokens)
        cached = tl.load(seq_lens_decoder_ptr + rows, rows < num_rows, other=0)
        is_prefill = tl.load(seq_lens_encoder_ptr + rows, rows < num_rows, other=0) > 0
        gathered = lengths + tl.where(is_prefill, cached, 0)
        ends = num_tokens + tl.cumsum(lengths)
        starts = ends - lengths
        key_ends = num_keys + tl.cumsum(gathered)
        key_starts = key_ends - gathered

        if tl.program_id(0) == 0:
            exists = rows < num_padded_rows
            tl.store(cu_seqlens_q_ptr + rows, 0, rows == 0)
            tl.store(cu_seqlens_q_ptr + rows + 1, ends, exists)
            tl.store(cu_seqlens_kg_ptr + rows, 0, rows == 0)
            tl.store(cu_seqlens_kg_ptr + rows + 1, key_ends, exists)

        # rows of this tile that end at or before the token
        done = tl.sum((ends[:, None] <= tokens[None, :]).to(tl.int32), axis=0)
        row = tl.minimum(done, ROW_TILE - 1)
        here = (tokens >= num_tokens) & (done < ROW_TILE)
        shifts = tl.where(here, tl.gather(cached - starts, row, 0), shifts)
        windows = tl.where(here, tl.gather(tl.where(is_prefill, key_starts, -1), row, 0), windows)
        token_rows += done
        if tile + 1 < NUM_ROW_TILES:
            num_tokens += tl.sum(lengths)
            num_keys += tl.sum(gathered)

    # a token past the last one has counted all rows, and the empty lanes of the last tile
    live = token_rows < num_rows
    positions = tl.where(live, tokens + shifts, 0)
    slots = _slots(tables, token_rows, positions, live, BLOCK_SIZE)
    has_window = live & (windows >= 0)
    ks = tl.where(has_window, windows, 0)
    ke = tl.where(has_window, windows + positions + 1, 0)
    exists = tokens < num_padded_tokens
    _store_tokens(
        outputs, int32_ptr, tokens, tl.where(live, token_rows, -1), positions, slots, exists
    )
    pairs = 2 * tokens[:, None] + tl.arange(0, 2)[None, :]
    tl.store(indexer_attn_mask_offsets_ptr + pairs, tl.join(ks, ke), exists[:, None])
