# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The lists that are derived from a step's outputs, one Triton launch each; a program a token.

Sources: vLLM #57434 and #57659 (rows of chosen entries once for each choice, not for each layer
that reads them), ROCm/ATOM #1343 (compressed rows before window rows).
"""

from __future__ import annotations

from fd_dsa.triton_runtime import paddle_jit

import triton.language as tl


@paddle_jit(
    do_not_specialize=("num_given", "row_stride", "comp_base"),
    do_not_specialize_on_alignment=("local_topk_ptr",),
    contiguous=("local_topk_ptr",),
)
def csa_rows_kernel(
    local_topk_ptr,
    csa_rows_ptr,
    req_of_token_ptr,
    csa_visible_ptr,
    csa_indptr_ptr,
    block_table_ptr,
    num_given,
    row_stride,
    comp_base,
    TOPK: tl.constexpr,
    ENTRIES_PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows of the chosen CSA entries, flat by `csa_indptr`; -1 for what is no entry of the token.

    Grid: (tokens,). Tokens from `num_given` on have chosen nothing.
    """
    token = tl.program_id(0)
    first = tl.load(csa_indptr_ptr + token)
    count = tl.load(csa_indptr_ptr + token + 1) - first
    visible = tl.load(csa_visible_ptr + token)
    table = block_table_ptr + tl.maximum(tl.load(req_of_token_ptr + token), 0) * row_stride
    num_chosen = tl.where(token < num_given, count, 0)
    for at in range(0, count, TILE):
        columns = at + tl.arange(0, TILE)
        chosen = local_topk_ptr + token * TOPK + columns
        entries = tl.load(chosen, mask=columns < num_chosen, other=-1)
        seen = (entries >= 0) & (entries < visible)
        blocks = tl.load(table + entries // ENTRIES_PER_BLOCK, mask=seen, other=0)
        rows = comp_base + blocks * ENTRIES_PER_BLOCK + entries % ENTRIES_PER_BLOCK
        tl.store(csa_rows_ptr + first + columns, tl.where(seen, rows, -1), mask=columns < count)


@paddle_jit()
def fused_list_kernel(
    indptr_ptr,
    rows_ptr,
    win_idx_ptr,
    win_len_ptr,
    compressed_indptr_ptr,
    compressed_ptr,
    WINDOW: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    SUM_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Offsets and rows of one list a token: compressed rows, then window rows.

    Grid: (tokens,). Without `compressed_indptr_ptr` there are window rows alone; without
    `compressed_ptr` the compressed rows are -1.
    """
    token = tl.program_id(0)
    lengths = tl.zeros((SUM_TILE,), tl.int32)
    for first in range(0, token, SUM_TILE):
        tokens = first + tl.arange(0, SUM_TILE)
        lengths += tl.load(win_len_ptr + tokens, mask=tokens < token, other=0)
    begin = tl.sum(lengths)
    at_window = begin
    if compressed_indptr_ptr is not None:
        source = tl.load(compressed_indptr_ptr + token)
        count = tl.load(compressed_indptr_ptr + token + 1) - source
        begin += source
        at_window = begin + count
        for at in range(0, count, TILE):
            columns = at + tl.arange(0, TILE)
            rows = tl.full((TILE,), -1, tl.int32)
            if compressed_ptr is not None:
                rows = tl.load(compressed_ptr + source + columns, mask=columns < count, other=-1)
            tl.store(rows_ptr + begin + columns, rows, mask=columns < count)
    length = tl.load(win_len_ptr + token)
    columns = tl.arange(0, WINDOW_TILE)
    rows = tl.load(win_idx_ptr + token * WINDOW + columns, mask=columns < length, other=-1)
    tl.store(rows_ptr + at_window + columns, rows, mask=columns < length)
    tl.store(indptr_ptr + token, begin)
    if token == tl.num_programs(0) - 1:
        tl.store(indptr_ptr + token + 1, at_window + length)
