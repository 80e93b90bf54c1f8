"""Queries of the indexer on a device: RoPE, quantisation and weight fold in one launch.

A row is one head of one token. A program takes BLOCK_ROWS rows, which are contiguous in memory
whatever the tokens they belong to. Both values of a pair are in the same thread, so that rotating
needs no exchange.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.triton_fp8 import (
    hadamard,
    load_row,
    rotated,
    scale_of_row,
    store_row,
    store_row_codes,
    widened,
)
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton.language as tl  # isort: skip

_NAME = "indexer_query"


def configuration(num_rows: int) -> tuple[int, int]:
    """BLOCK_ROWS and num_warps for this many heads of all tokens."""
    if num_rows <= 16384:
        return 8, 1
    return (32, 4) if num_rows <= 131072 else (32, 2)


@step_kernel(waits=True)
def prepare_query_kernel(
    q_ptr,
    weights_ptr,
    position_ids_ptr,
    cos_sin_ptr,
    q_out_ptr,
    w_out_ptr,
    num_rows,
    num_positions,
    weights_scale: float,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    QUANTIZED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HADAMARD: tl.constexpr,
    UE8M0: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """See `prepare_indexer_query`; rows of 4 * HALF values, HEADS of them a token.

    Where programs divide tokens evenly, each has the rows of one token and needs no mask.
    """
    wait_for_inputs()
    start_next()
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    if HEADS % BLOCK_ROWS == 0:
        inside = None
        mask = None
        angle_row = first_row // HEADS + row * 0
    else:
        inside = row < num_rows
        mask = inside[:, None]
        angle_row = row // HEADS
    if position_ids_ptr is not None:
        angle_row = tl.load(position_ids_ptr + angle_row, mask=inside)
        # a position past the table must not be an address
        angle_row = tl.minimum(tl.maximum(angle_row, 0), num_positions - 1)
    start = (row * (4 * HALF))[:, None]
    if QUANTIZED:
        q_out_ptr = q_out_ptr.to(tl.pointer_type(tl.uint8))
    a, b, c, d = load_row(q_ptr + start, mask, HALF, INTERLEAVED, HADAMARD)
    weight = widened(tl.load(weights_ptr + row, mask=inside)) * weights_scale
    angle = cos_sin_ptr + angle_row[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    cos, sin = tl.load(angle, mask=mask), tl.load(angle + HALF, mask=mask)
    a, b = rotated(a, b, cos, sin)
    if HADAMARD:
        a, b, c, d = hadamard(a, b, c, d, HALF, INTERLEAVED)
    out = q_out_ptr + start
    if QUANTIZED:
        scale = scale_of_row(a, b, c, d, UE8M0)
        weight *= scale
        store_row_codes(out, a, b, c, d, scale, mask, HALF, INTERLEAVED, HADAMARD, UE8M0)
    else:
        store_row(out, a, b, c, d, mask, HALF, INTERLEAVED, HADAMARD)
    tl.store(w_out_ptr + row, weight, mask=inside)


def prepare_indexer_query(
    q: Tensor,
    weights: Tensor,
    position_ids: Tensor | None,
    cos_sin_cache: Tensor,
    *,
    out: tuple[Tensor, Tensor],
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """See `fd_dsa.ops.query.indexer_query`, with results to write."""
    num_rows = weights.shape[0] * weights.shape[1]
    if num_rows:
        block_rows, num_warps = configuration(num_rows)
        prepare_query_kernel[(-(-num_rows // block_rows),)](
            **kernel_arguments(q, weights, position_ids, cos_sin_cache, out, **how),
            BLOCK_ROWS=block_rows,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return out


def kernel_arguments(
    q: Tensor,
    weights: Tensor,
    position_ids: Tensor | None,
    cos_sin_cache: Tensor,
    out: tuple[Tensor, Tensor],
    *,
    rope_interleave: bool,
    quantized: bool,
    hadamard: bool = False,
    scale_fmt: str | None = "ue8m0",
    weights_scale: float = 1.0,
) -> dict[str, object]:
    """Arguments of `prepare_query_kernel` by name, but for BLOCK_ROWS; launch without fusion.

    Raises:
        ShapeError: a width that the kernel has no tiles for.
    """
    num_tokens, heads, width = q.shape
    half = cos_sin_cache.shape[1] // 2
    if width != 4 * half or half & (half - 1):
        raise ShapeError(
            f"{_NAME}: a device needs index_head_dim = 2 * rope_dim, a power of two, "
            f"got {width} and {2 * half}"
        )
    has_positions = position_ids is not None
    return {
        "q_ptr": q,
        "weights_ptr": weights,
        "position_ids_ptr": position_ids,
        "cos_sin_ptr": cos_sin_cache,
        "q_out_ptr": out[0],
        "w_out_ptr": out[1],
        "num_rows": num_tokens * heads,
        "num_positions": cos_sin_cache.shape[0] if has_positions else 0,
        "weights_scale": weights_scale,
        "HEADS": heads,
        "HALF": half,
        "QUANTIZED": quantized,
        "INTERLEAVED": rope_interleave,
        "HADAMARD": hadamard,
        "UE8M0": scale_fmt == "ue8m0",
    }
