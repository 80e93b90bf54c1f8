"""Indexer scores of fp8_ds_mla and bfloat16 caches on tensor cores, directly from the pages.

A program keeps the queries of a tile of tokens, and copies the pages of their request to shared
memory asynchronously. Keys are the rows of a GEMM and (token, head) pairs its columns. So a warp
holds all heads of a key, and their sum stays in registers. A schedule, made once a step, assigns
pages to programs (`tile_schedule.py`).

A page of the kernel has 64 keys: one block of the cache, or two blocks of 32 keys.
"""

from __future__ import annotations

from fd_dsa.cache_formats import INDEX_WIDTH
from fd_dsa.ops.arrays import allocator_beside
from fd_dsa.ops.device_functions import key_bounds
from fd_dsa.ops.key_bounds import prompt_windows
from fd_dsa.ops.logits.tile_configs import PAGE, decode_config, padded_heads, prompt_config
from fd_dsa.ops.logits.tile_schedule import TileSchedule
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import start_next, wait_for_inputs
from fd_dsa.triton_runtime.device_api import traits_for

import triton  # isort: skip
import triton.language as tl  # isort: skip

_PAGE, _WIDTH = tl.constexpr(PAGE), tl.constexpr(INDEX_WIDTH)


@triton.jit
def _queries(
    q_ptr,
    weights_ptr,
    position_ids_ptr,
    offsets_ptr,
    key_starts_ptr,
    seq_lens_encoder_ptr,
    request,
    first,
    num,
    logits_width,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Load queries, head weights, first keys and ends of keys of `num` tokens from `first` on."""
    column = tl.arange(0, TOKENS * HEADS)
    token, head = column // HEADS, column % HEADS
    live = (token < num) & (head < NUM_HEADS)
    row = (first + token).to(tl.int64) * NUM_HEADS + head
    value = row[:, None] * _WIDTH + tl.arange(0, _WIDTH)[None, :]
    # missing heads and tokens have queries and weights of 0
    q = tl.load(q_ptr + value, mask=live[:, None], other=0.0)
    weights = tl.load(weights_ptr + row, mask=live, other=0.0)
    token = tl.arange(0, TOKENS)
    begins, ends = key_bounds(
        first + token, request, token < num, position_ids_ptr, offsets_ptr, key_starts_ptr,
        seq_lens_encoder_ptr,
    )  # fmt: skip
    return tl.trans(q), weights, begins, tl.minimum(ends, logits_width)


@triton.jit
def _score(
    k,
    scale,
    held,
    key,
    q,
    weights,
    begins,
    ends,
    out_ptr,
    logits_stride,
    HAS_WINDOWS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Store the scores of some tokens for the keys of a page."""
    dots = tl.dot(k, q)
    # one instruction, which keeps NaN
    dots = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
    by_token = tl.reshape(dots * weights[None, :], [_PAGE, TOKENS, HEADS])
    scores = tl.sum(by_token, axis=2)
    if scale is not None:
        scores *= scale
    # keys without a block are masked
    scores = tl.where(held, scores, float("-inf"))
    row = tl.arange(0, TOKENS).to(tl.int64) * logits_stride
    out = out_ptr + row[None, :] + key[:, None]
    seen = key[:, None] < ends[None, :]
    if HAS_WINDOWS:
        seen = seen & (key[:, None] >= begins[None, :])
    tl.store(out, scores, mask=seen)


@triton.jit
def _entry(table_ptr, column, table_width):
    """Load a block table's entry, -1 past the end of its row."""
    return tl.load(table_ptr + column, mask=column < table_width, other=-1)


@triton.jit
def _block_of(entry, num_blocks):
    """Return the block of an entry, -1 for an entry outside of the cache."""
    return tl.where((entry >= 0) & (entry < num_blocks), entry, -1)


@triton.jit
def _of_keys(first, second, BLOCK_SIZE: tl.constexpr):
    """Return the block of each key of a page, [PAGE, 1], or `first` if the page is one block."""
    blocks = first
    if BLOCK_SIZE < _PAGE:
        blocks = tl.where(tl.arange(0, _PAGE)[:, None] < BLOCK_SIZE, first, second)
    return blocks


@triton.jit
def _starts(cache_ptr, blocks, BLOCK_SIZE: tl.constexpr, ROW: tl.constexpr):
    """Return the addresses of blocks, that of block 0 for a missing block."""
    return cache_ptr + tl.maximum(blocks, 0).to(tl.int64) * (BLOCK_SIZE * ROW)


@triton.jit
def _scales(cache_ptr, blocks, BLOCK_SIZE: tl.constexpr, ROW: tl.constexpr):
    """Load the scales of a page's keys, float32 [PAGE, 1]."""
    start = _starts(cache_ptr, blocks, BLOCK_SIZE, ROW) + BLOCK_SIZE * _WIDTH
    row = tl.arange(0, _PAGE)[:, None] % BLOCK_SIZE
    return tl.load(start.to(tl.pointer_type(tl.float32)) + row)


@triton.jit
def _score_pages(
    q_ptr,
    weights_ptr,
    cache_ptr,
    position_ids_ptr,
    offsets_ptr,
    key_starts_ptr,
    seq_lens_encoder_ptr,
    table_ptr,
    out_ptr,
    request,
    token,
    num,
    first_page,
    end_page,
    table_width,
    logits_width,
    logits_stride,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    ROW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
):
    """Score pages of one request for `num` tokens of a tile, at most FIRST + REST.

    The compiler copies pages ahead only if no other load in the loop waits for memory. So the table
    is read two pages ahead, and scales one page.
    """
    row = tl.arange(0, _PAGE)
    at = (row % BLOCK_SIZE)[:, None] * _WIDTH + tl.arange(0, _WIDTH)[None, :]
    HAS_WINDOWS: tl.constexpr = offsets_ptr is not None
    HAS_SCALES: tl.constexpr = ROW > _WIDTH
    q, weights, begins, ends = _queries(
        q_ptr, weights_ptr, position_ids_ptr, offsets_ptr, key_starts_ptr, seq_lens_encoder_ptr,
        request, token, num, logits_width, NUM_HEADS, HEADS, FIRST,
    )  # fmt: skip
    if REST > 0:
        more_q, more_weights, more_begins, more_ends = _queries(
            q_ptr, weights_ptr, position_ids_ptr, offsets_ptr, key_starts_ptr,
            seq_lens_encoder_ptr, request, token + FIRST, num - FIRST, logits_width, NUM_HEADS,
            HEADS, REST,
        )  # fmt: skip
        more_ptr = out_ptr + FIRST * logits_stride.to(tl.int64)
    BLOCKS: tl.constexpr = _PAGE // BLOCK_SIZE
    column = first_page * BLOCKS
    block = _block_of(_entry(table_ptr, column, table_width), num_blocks)
    next_entry = _entry(table_ptr, column + BLOCKS, table_width)
    other = block
    if BLOCKS > 1:
        other = _block_of(_entry(table_ptr, column + 1, table_width), num_blocks)
        next_other = _entry(table_ptr, column + BLOCKS + 1, table_width)
    scale = None
    if HAS_SCALES:
        scale = _scales(cache_ptr, _of_keys(block, other, BLOCK_SIZE), BLOCK_SIZE, ROW)
    for page in range(first_page, end_page):
        blocks = _of_keys(block, other, BLOCK_SIZE)
        k = tl.load(_starts(cache_ptr, blocks, BLOCK_SIZE, ROW).to(q_ptr.dtype) + at)
        held = blocks >= 0
        column = (page + 2) * BLOCKS
        block = _block_of(next_entry, num_blocks)
        next_entry = _entry(table_ptr, column, table_width)
        if BLOCKS > 1:
            other = _block_of(next_other, num_blocks)
            next_other = _entry(table_ptr, column + 1, table_width)
        if HAS_SCALES:
            next_blocks = _of_keys(block, other, BLOCK_SIZE)
            next_scale = _scales(cache_ptr, next_blocks, BLOCK_SIZE, ROW)
        key = page * _PAGE + row
        _score(
            k, scale, held, key, q, weights, begins, ends, out_ptr, logits_stride, HAS_WINDOWS,
            HEADS, FIRST,
        )  # fmt: skip
        if REST > 0:
            _score(
                k, scale, held, key, more_q, more_weights, more_begins, more_ends, more_ptr,
                logits_stride, HAS_WINDOWS, HEADS, REST,
            )  # fmt: skip
        if HAS_SCALES:
            scale = next_scale


@step_kernel(strided=("logits_ptr",), waits=True)
def tile_kernel(
    q_ptr,
    weights_ptr,
    cache_ptr,
    position_ids_ptr,
    block_tables_ptr,
    offsets_ptr,
    key_starts_ptr,
    seq_lens_encoder_ptr,
    tiles_ptr,
    programs_ptr,
    logits_ptr,
    chunk,
    first_token,
    num_rows,
    table_width,
    logits_width,
    logits_stride,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    ROW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
):
    """Score the pages of program `program 0` in the schedule, of one or more successive tiles."""
    wait_for_inputs()
    if ROW > _WIDTH:
        q_ptr = q_ptr.to(tl.pointer_type(tl.float8e4nv))
    own = programs_ptr + (chunk * tl.num_programs(0) + tl.program_id(0)) * 8
    tile, page, left = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    token, num = tl.load(own + 4), tl.load(own + 5)
    request, num_pages = tl.load(own + 6), tl.load(own + 7)
    while left > 0:
        # the schedule may have tokens without a row of scores, which must not be written
        num = tl.where(token < first_token, 0, tl.minimum(num, first_token + num_rows - token))
        count = tl.minimum(num_pages - page, left)
        table_ptr = block_tables_ptr + request.to(tl.int64) * table_width
        out_ptr = logits_ptr + (token - first_token).to(tl.int64) * logits_stride
        if REST > 0 and num > FIRST:
            _score_pages(
                q_ptr, weights_ptr, cache_ptr, position_ids_ptr, offsets_ptr, key_starts_ptr,
                seq_lens_encoder_ptr, table_ptr, out_ptr, request, token, num, page, page + count,
                table_width, logits_width, logits_stride, num_blocks, BLOCK_SIZE, ROW, NUM_HEADS,
                HEADS, FIRST, REST,
            )  # fmt: skip
        else:
            # every tile without REST, and tiles of decode rows among prompts
            _score_pages(
                q_ptr, weights_ptr, cache_ptr, position_ids_ptr, offsets_ptr, key_starts_ptr,
                seq_lens_encoder_ptr, table_ptr, out_ptr, request, token, num, page, page + count,
                table_width, logits_width, logits_stride, num_blocks, BLOCK_SIZE, ROW, NUM_HEADS,
                HEADS, FIRST, 0,
            )  # fmt: skip
        left -= count
        page = 0
        if left > 0:
            tile += 1
            entry = tiles_ptr + tile * 4
            token, num = tl.load(entry), tl.load(entry + 1)
            request, num_pages = tl.load(entry + 2), tl.load(entry + 3)
    start_next()


def score_tiles(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    step: ForwardMeta,
    schedule: TileSchedule,
    logits: Tensor,
    *,
    first_token: int = 0,
    chunk: int = 0,
) -> None:
    """Write the scores of a chunk of tokens, as `fd_dsa.ops.indexer_logits` describes.

    Products of e4m3 numbers are exact. Their sums have the precision of the processor's FP8 path,
    those of bfloat16 numbers that of float32.
    Results do not depend on the other tokens of a step.

    Args:
        q: uint8 or float8_e4m3fn; bfloat16 over a bfloat16 cache.
        cache: blocks of 64 or 32 keys of 128 values.
        schedule: schedule that was filled for `step`.
        logits: float32 [num_rows, width], scores of the tokens from `first_token` on. There may be
            gaps between rows. Entries outside of a token's window, rows of padding, and rows that
            are not in the schedule stay as they are. A key whose block is -1 or past the cache gets
            -inf.
        chunk: index of the chunk in the schedule.

    Cost: one launch of the programs of the schedule.
    Source: DeepGEMM's paged_mqa_logits, for the fixed programs that share the work.
    """
    num_heads, config = q.shape[1], schedule.config
    num_rows, width = logits.shape
    if num_rows == 0 or width == 0:
        return
    inputs = q, weights, cache, step.position_ids, step.block_tables, *prompt_windows(step)
    sizes = step.block_tables.shape[1], width, logits.stride()[0], cache.shape[0]
    tile_kernel[(schedule.programs.shape[1],)](
        *(*inputs, schedule.tiles, schedule.programs, logits),
        *(chunk, first_token, num_rows, *sizes),
        BLOCK_SIZE=cache.shape[1],
        ROW=cache.shape[2],
        NUM_HEADS=num_heads,
        HEADS=padded_heads(num_heads),
        FIRST=config.first_tokens,
        REST=config.rest_tokens,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
    )


def score_step(
    q: Tensor, weights: Tensor, cache: Tensor, step: ForwardMeta, logits: Tensor
) -> None:
    """Write the scores of a step by `score_tiles`, with a new schedule."""
    num_tokens, heads, _ = q.shape
    is_fp8 = cache.shape[2] > INDEX_WIDTH
    if step.num_prefill_tokens:
        config = prompt_config(heads, is_fp8=is_fp8)
    else:
        config = decode_config(heads, 1, is_fp8=is_fp8)
    programs = traits_for(q).num_processors * config.programs_per_processor
    schedule = TileSchedule.allocate(config, num_tokens, 1, programs, allocator_beside(q))
    schedule.fill(step, logits.shape[1])
    score_tiles(q, weights, cache, step, schedule, logits)
