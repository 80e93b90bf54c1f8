"""Index keys gathered on a device: programs over gathered rows, whatever request they belong to."""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops._triton import blocks_of
from fd_dsa.triton_runtime import paddle_jit

import triton  # isort: skip
import triton.language as tl  # isort: skip

_ROWS, _NUM_WARPS = 32, 4


@triton.jit
def _request_of(cu_seqlens_ptr, row, num_requests, STEPS: tl.constexpr):
    """Largest b with cu_seqlens[b] <= row, found bit by bit; `row` lies before the last entry."""
    request = row * 0
    for step in tl.static_range(STEPS):
        later = tl.minimum(request + (1 << (STEPS - 1 - step)), num_requests)
        request = tl.where(tl.load(cu_seqlens_ptr + later) <= row, later, request)
    return request


@triton.jit
def _copy_rows(
    index_ptr,
    block_tables_ptr,
    cu_seqlens_ptr,
    seq_lens_encoder_ptr,
    out_k_ptr,
    out_scale_ptr,
    row,
    request,
    end,
    table_width,
    num_blocks,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Rows before `end`, each of its request; `request` may be one for all."""
    # a vector also where `request` is one number: Triton 3.9 interprets no mixed masks
    mask = (row < end) & (row * 0 < tl.load(seq_lens_encoder_ptr + request))
    position = row - tl.load(cu_seqlens_ptr + request)
    block = blocks_of(
        block_tables_ptr, request, position, mask, table_width, num_blocks, BLOCK_SIZE
    )
    mask &= block >= 0
    block = tl.where(mask, block, 0).to(tl.int64)
    offset = position % BLOCK_SIZE
    row = row.to(tl.int64)
    HAS_SCALES: tl.constexpr = out_scale_ptr is not None
    start = index_ptr + block * (BLOCK_SIZE * (WIDTH + 4 * HAS_SCALES))
    column = tl.arange(0, WIDTH)[None, :]
    keys = tl.load((start + offset * WIDTH)[:, None] + column, mask=mask[:, None])
    out = out_k_ptr.to(index_ptr.dtype)
    tl.store(out + row[:, None] * WIDTH + column, keys, mask=mask[:, None])
    if HAS_SCALES:
        scales = (start + BLOCK_SIZE * WIDTH).to(tl.pointer_type(tl.float32))
        tl.store(out_scale_ptr + row, tl.load(scales + offset, mask=mask), mask=mask)


@paddle_jit(
    do_not_specialize=("num_keys", "num_requests", "table_width", "num_blocks"),
    contiguous=(
        "index_ptr",
        "block_tables_ptr",
        "cu_seqlens_ptr",
        "seq_lens_encoder_ptr",
        "out_k_ptr",
        "out_scale_ptr",
    ),
)
def gather_kernel(
    index_ptr,
    block_tables_ptr,
    cu_seqlens_ptr,
    seq_lens_encoder_ptr,
    out_k_ptr,
    out_scale_ptr,
    num_keys,
    num_requests,
    table_width,
    num_blocks,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """See `gather_indexer_keys`; `out_scale_ptr` is None where keys have no scales."""
    first_row = tl.program_id(0) * ROWS
    end = tl.minimum(tl.load(cu_seqlens_ptr + num_requests), num_keys)
    if first_row >= end:
        return
    row = first_row + tl.arange(0, ROWS)
    request = _request_of(cu_seqlens_ptr, first_row, num_requests, STEPS)
    if tl.load(cu_seqlens_ptr + request + 1) >= tl.minimum(end, first_row + ROWS):
        _copy_rows(
            index_ptr, block_tables_ptr, cu_seqlens_ptr, seq_lens_encoder_ptr, out_k_ptr,
            out_scale_ptr, row, request, end, table_width, num_blocks, WIDTH, BLOCK_SIZE,
        )  # fmt: skip
    else:
        requests = _request_of(cu_seqlens_ptr, tl.minimum(row, end - 1), num_requests, STEPS)
        _copy_rows(
            index_ptr, block_tables_ptr, cu_seqlens_ptr, seq_lens_encoder_ptr, out_k_ptr,
            out_scale_ptr, row, requests, end, table_width, num_blocks, WIDTH, BLOCK_SIZE,
        )  # fmt: skip


def gather_indexer_keys(
    index_cache: Any,
    block_tables: Any,
    cu_seqlens_kg: Any,
    seq_lens_encoder: Any,
    out_k: Any,
    out_scale: Any,
) -> None:
    """See `fd_dsa.ops.indexer_gather.gather_indexer_keys`.

    Raises:
        ShapeError: index_head_dim is no power of two.
    """
    num_keys, width = out_k.shape
    if width & (width - 1):
        raise ShapeError(
            f"gather_indexer_keys: a device needs a power of two as index_head_dim, got {width}"
        )
    num_requests = block_tables.shape[0]
    if num_keys == 0 or num_requests == 0:
        return
    gather_kernel[(-(-num_keys // _ROWS),)](
        index_cache,
        block_tables,
        cu_seqlens_kg,
        seq_lens_encoder,
        out_k,
        out_scale,
        num_keys,
        num_requests,
        block_tables.shape[1],
        index_cache.shape[0],
        WIDTH=width,
        BLOCK_SIZE=index_cache.shape[1],
        STEPS=(num_requests - 1).bit_length(),
        ROWS=_ROWS,
        num_warps=_NUM_WARPS,
    )
