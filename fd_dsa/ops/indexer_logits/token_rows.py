"""What kernels that know rows, not steps, must be told of a step: a row for each token.

DeepGEMM scores a batch of rows with a block table each, or windows of gathered keys. A token
becomes a row of its own, so prompts, drafts, idle rows and padding need no cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fd_dsa.step import ForwardMeta
from fd_dsa.triton_runtime import paddle_jit

import triton.language as tl  # isort: skip

_BLOCK = 256


@dataclass(frozen=True)
class TokenRows:
    """Rows of the tokens of a step, in buffers that do not move.

    Attributes:
        lengths: int32 [capacity]; keys that a token scores in its pages. 1 where it scores none:
            an empty row is work that no schedule counts, and would be left to one processor.
        tables: int32 [capacity, max_blocks]; its pages, of an empty row block 0.
        starts, ends: int32 [capacity]; its window of the gathered keys, empty where it has none.
        is_gathered: int32 [capacity]; 1 = it scores gathered keys, 0 = pages, or nothing.
    """

    lengths: Any
    tables: Any
    starts: Any
    ends: Any
    is_gathered: Any


@paddle_jit(
    do_not_specialize=(
        "num_tokens",
        "num_requests",
        "row_stride",
        "table_width",
        "max_length",
        "max_gathered",
    ),
    contiguous=(
        "position_ids_ptr",
        "batch_id_per_token_ptr",
        "cu_seqlens_ptr",
        "seq_lens_encoder_ptr",
        "lengths_ptr",
        "tables_ptr",
        "starts_ptr",
        "ends_ptr",
        "is_gathered_ptr",
    ),
)
def token_rows_kernel(
    position_ids_ptr,
    batch_id_per_token_ptr,
    block_tables_ptr,
    cu_seqlens_ptr,
    seq_lens_encoder_ptr,
    lengths_ptr,
    tables_ptr,
    starts_ptr,
    ends_ptr,
    is_gathered_ptr,
    num_tokens,
    num_requests,
    row_stride,
    table_width,
    max_length,
    max_gathered,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of token `program 0`; one past the step's tokens becomes empty."""
    token = tl.program_id(0).to(tl.int64)
    inside = token < num_tokens
    batch_id = tl.load(batch_id_per_token_ptr + token, mask=inside, other=-1)
    length = tl.load(position_ids_ptr + token, mask=inside, other=0).to(tl.int32) + 1
    length = tl.minimum(length, max_length)
    is_real = batch_id >= 0
    request = tl.maximum(batch_id, 0).to(tl.int64)
    is_gathered = batch_id < -1
    start = batch_id * 0
    if cu_seqlens_ptr is not None:
        # an empty window lies beside its neighbours': one kernel block spans several tokens' keys
        at = tl.where(is_real, request, num_requests)
        start = tl.minimum(tl.load(cu_seqlens_ptr + at), max_gathered)
        end = tl.load(cu_seqlens_ptr + request + 1)
        is_prefill = tl.load(seq_lens_encoder_ptr + request, mask=is_real, other=0) > 0
        is_gathered = is_real & is_prefill & (end <= max_gathered)
    tl.store(starts_ptr + token, start)
    tl.store(ends_ptr + token, tl.where(is_gathered, start + length, start))
    tl.store(is_gathered_ptr + token, is_gathered.to(tl.int32))
    in_pages = is_real & (is_gathered == 0)
    length = tl.where(in_pages, length, 1)
    tl.store(lengths_ptr + token, length)
    num_pages = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
    num_read = tl.where(in_pages, num_pages, 0)
    source = block_tables_ptr + request * row_stride
    target = tables_ptr + token * table_width
    for first in range(0, num_pages, BLOCK):
        column = first + tl.arange(0, BLOCK)
        block = tl.load(source + column, mask=column < num_read, other=0)
        # no page at all is read as block 0: its keys are refused where they are chosen
        tl.store(target + column, tl.maximum(block, 0), mask=column < num_pages)


def fill_token_rows(
    rows: TokenRows,
    step: ForwardMeta,
    *,
    block_size: int,
    num_rows: int,
    max_length: int,
    max_gathered: int,
) -> None:
    """Write the rows of a step's tokens, and empty ones up to `num_rows`.

    Args:
        step: tokens of prefill rows are gathered ones where `cu_seqlens_kg` is there.
        num_rows: at least the step's tokens.
        max_length: most keys of a token, at most what its table holds.
        max_gathered: keys that the gather has room for; a request that ends past them is scored
            in its pages.

    Cost: one launch; no allocation, no wait.
    """
    if num_rows == 0:
        return
    tables = step.block_tables
    max_length = min(max_length, tables.shape[1] * block_size)
    gathers = step.cu_seqlens_kg is not None
    token_rows_kernel[(num_rows,)](
        step.position_ids,
        step.batch_id_per_token,
        tables,
        step.cu_seqlens_kg,
        step.seq_lens_encoder if gathers else None,
        rows.lengths,
        rows.tables,
        rows.starts,
        rows.ends,
        rows.is_gathered,
        step.position_ids.shape[0],
        tables.shape[0],
        tables.stride()[0],
        rows.tables.shape[1],
        max_length,
        max_gathered,
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
