"""Dequantization of the FP8 records of prompts, for many tokens that read the same records.

A token of a prompt reads 2,048 records, and its neighbours read mostly the same ones. A kernel that
converts codes for each token repeats the work thousands of times. Here records become rows of
16-bit values once. The device decides which rows of a step are worth it, and fit the memory.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from fd_dsa.cache_formats import (
    LATENT_RECORD_BYTES,
    LATENT_ROPE_AT,
    LATENT_SCALES_AT,
    LATENT_WIDTH,
    ROPE_WIDTH,
)
from fd_dsa.ops.device_functions import e4m3_values
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

# size of a row of 16-bit values, and of a line of the L2 cache, in float32 words
_ROW_WORDS, _LINE_WORDS = (LATENT_WIDTH + ROPE_WIDTH) // 2, 32
_RECORD, _SCALES_AT = tl.constexpr(LATENT_RECORD_BYTES), tl.constexpr(LATENT_SCALES_AT)
_RANK, _ROPE_AT = tl.constexpr(LATENT_WIDTH), tl.constexpr(LATENT_ROPE_AT)
_WIDTH = tl.constexpr(LATENT_WIDTH + ROPE_WIDTH)
_PROGRAMS, _NUM_WARPS, _RECORDS = 528, 8, tl.constexpr(16)
# a server has few sizes of caches and numbers of rows
_CACHED_LAYOUTS = 64
# dequantizing pays up to this number of keys for each new token and 64 heads; measured on an H200
_KEYS_PER_TOKEN = 128


def keys_per_token(num_heads: int) -> int:
    """Return the max keys per new token of a row whose records are dequantized first."""
    return _KEYS_PER_TOKEN * -(-num_heads // 64)


class Dequantized(NamedTuple):
    """Values that `fd_dsa_sparse_mla_wide_cuda` reads instead of records.

    The first three are float32 tensors, whose memory has other types.

    Attributes:
        values: 16-bit [num_slots, 576], float16 latents and bfloat16 rotated values.
        blocks: int32 [num_blocks], block of `values` for each block of the cache. Only entries of
            dequantized rows are valid.
        is_dequantized: int32 [num_rows], 1 for a dequantized row.
        batch_id_per_token: int32 [num_tokens], row of each token.
        block_size: slots of a block.
        num_slots: capacity of `values`.
    """

    values: Any
    blocks: Any
    is_dequantized: Any
    batch_id_per_token: Any
    block_size: int
    num_slots: int


@triton.jit
def _dequantize_slots(cache_ptr, values_ptr, slot, target, mask):
    """Dequantize the records at `slot` to the rows `target`, both int64."""
    # a record has four parts of 128 latents, each with a scale
    part, column = tl.arange(0, 4)[None, :], tl.arange(0, 128)[None, None, :]
    is_part = tl.broadcast_to(mask[:, None], [slot.shape[0], 4])
    record = cache_ptr + slot * _RECORD
    row = values_ptr.to(tl.pointer_type(tl.int16)) + target * _WIDTH
    codes = tl.load((record[:, None] + part * 128)[:, :, None] + column, mask=is_part[:, :, None])
    scales = (record + _SCALES_AT).to(tl.pointer_type(tl.float32))[:, None] + part
    scale = (tl.load(scales, mask=is_part) * 256.0).to(tl.float16).to(tl.float32)
    # exact in float32 up to the last rounding, which is that of sparse MLA
    latents = (e4m3_values(codes, tl.float32) * (1.0 / 256.0) * scale[:, :, None]).to(tl.float16)
    tl.store(
        (row[:, None] + part * 128)[:, :, None] + column,
        latents.to(tl.int16, bitcast=True),
        mask=is_part[:, :, None],
    )
    of_rope = tl.arange(0, 64)[None, :]
    rope = (record + _ROPE_AT).to(tl.pointer_type(tl.int16))[:, None] + of_rope
    tl.store(
        (row + _RANK)[:, None] + of_rope, tl.load(rope, mask=mask[:, None]), mask=mask[:, None]
    )


@step_kernel()
def dequantize_kernel(
    cache_ptr,
    block_tables_ptr,
    seq_lens_encoder_ptr,
    seq_lens_decoder_ptr,
    seq_lens_this_time_ptr,
    values_ptr,
    blocks_ptr,
    is_dequantized_ptr,
    num_rows,
    table_width,
    num_blocks,
    capacity,
    keys_per_token,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Dequantize every `num_programs`th block of a step, see `DequantizedRecords.fill`."""
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    new = tl.load(seq_lens_encoder_ptr + row, mask=is_row, other=0)
    keys = tl.load(seq_lens_decoder_ptr + row, mask=is_row, other=0)
    keys += tl.load(seq_lens_this_time_ptr + row, mask=is_row, other=0)
    count = (keys + (BLOCK_SIZE - 1)) // BLOCK_SIZE
    is_chosen = (new > 0) & ((keys + keys_per_token - 1) // keys_per_token <= new)
    is_chosen &= (count <= capacity) & (count <= table_width)
    ends = tl.cumsum(tl.where(is_chosen, count, 0))
    is_chosen &= ends <= capacity
    flags = is_dequantized_ptr.to(tl.pointer_type(tl.int32))
    if tl.program_id(0) == 0:
        tl.store(flags + row, is_chosen.to(tl.int32), mask=is_row)
    total = tl.max(tl.where(is_chosen, ends, 0))
    blocks = blocks_ptr.to(tl.pointer_type(tl.int32))
    for place in range(tl.program_id(0), total, tl.num_programs(0)):
        request = tl.sum((ends <= place).to(tl.int32))
        is_mine = row == request
        column = place - tl.sum(tl.where(is_mine, ends - count, 0))
        left = tl.sum(tl.where(is_mine, keys, 0)) - column * BLOCK_SIZE
        block = tl.load(block_tables_ptr + request.to(tl.int64) * table_width + column)
        is_block = (block >= 0) & (block < num_blocks)
        tl.store(blocks + tl.where(is_block, block, 0), place, mask=is_block)
        for first in range(0, tl.minimum(left, BLOCK_SIZE), _RECORDS):
            offset = first + tl.arange(0, _RECORDS)
            slot = tl.where(is_block, block, 0).to(tl.int64) * BLOCK_SIZE + offset
            target = (place * BLOCK_SIZE + offset).to(tl.int64)
            # a vector, because Triton 3.9's interpreter supports no mask of a scalar and a block
            mask = (offset < tl.minimum(left, BLOCK_SIZE)) & (offset * 0 <= block)
            mask &= offset * 0 + block < num_blocks
            _dequantize_slots(cache_ptr, values_ptr, slot, target, mask)


class DequantizedRecords:
    """Memory for the dequantized records of a step's prompts.

    Args:
        memory: contiguous float32 [n] on the device. It must not be used otherwise between `fill`
            and the launch that reads the result.
        keys_per_token: maximum keys of a row for each of its new tokens. A row with more keys is
            not dequantized.
        max_rows: usual maximum of rows. The kernel is compiled again for steps with more rows.
    """

    def __init__(self, memory: Tensor, keys_per_token: int, max_rows: int = 1) -> None:
        self._memory, self._keys_per_token = memory, keys_per_token
        self._max_rows = max_rows
        self._layout = lru_cache(maxsize=_CACHED_LAYOUTS)(self._laid_out)

    def fill(self, cache: Tensor, step: ForwardMeta) -> Dequantized | None:
        """Dequantize the records of a step's prefill rows.

        Latents are float16(code / 256 * float16(256 * scale)), rounded once. Sparse MLA itself
        makes the same numbers from the records.

        A row with more keys than `keys_per_token` times its new tokens is skipped. So is a row
        whose blocks do not fit after those of earlier rows, and a table entry outside the cache.

        Args:
            cache: uint8 [num_blocks, ..., block_size, 656] fp8_ds_mla records.

        Returns:
            Views of the memory, valid until the next call; None if the memory fits no block.

        Cost: one launch.
        Source: vLLM's cp_gather_and_upconvert_fp8_kv_cache, which makes bfloat16 rows.
        """
        num_blocks, block_size = cache.shape[0], prod(cache.shape[1:-1])
        num_rows, table_width = step.block_tables.shape
        values, blocks, flags, capacity = self._layout(num_blocks, num_rows, block_size)
        if capacity == 0 or num_rows == 0:
            return None
        dequantize_kernel[(min(_PROGRAMS, capacity),)](
            *(cache, step.block_tables),
            *(step.seq_lens_encoder, step.seq_lens_decoder, step.seq_lens_this_time),
            *(values, blocks, flags),
            *(num_rows, table_width, num_blocks, capacity, self._keys_per_token),
            BLOCK_SIZE=block_size,
            ROWS=next_power_of_2(max(num_rows, self._max_rows)),
            num_warps=_NUM_WARPS,
        )
        ids, num_slots = step.batch_id_per_token, capacity * block_size
        return Dequantized(values, blocks, flags, ids, block_size, num_slots)

    def _laid_out(
        self, num_blocks: int, num_rows: int, block_size: int
    ) -> tuple[Any, Any, Any, int]:
        """Return views for values, blocks and flags, and the capacity in blocks."""
        first = -(-(num_blocks + num_rows) // _LINE_WORDS) * _LINE_WORDS
        room = max(prod(self._memory.shape) - first, 0)
        capacity = min(room // (block_size * _ROW_WORDS), (2**31 - 1) // block_size)
        if capacity == 0:
            return None, None, None, 0
        flags = self._memory[num_blocks : num_blocks + num_rows]
        values = self._memory[first : first + capacity * block_size * _ROW_WORDS]
        return values, self._memory[:num_blocks], flags, capacity
