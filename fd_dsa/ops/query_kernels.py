"""Queries of the indexer and of MLA on a device, each made by one launch.

A row is one head of one token. A program processes BLOCK_ROWS rows, which are contiguous in the
result. Both values of a pair are in the same thread, so that the rotation exchanges no values
between threads.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import outer_strides
from fd_dsa.ops.device_functions import (
    hadamard,
    load_pairs,
    load_row,
    rotated,
    scale_of_row,
    store_pairs,
    store_row,
    store_row_codes,
    stored,
    widened,
)
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

_INDEXER, _MLA = "indexer_query", "prepare_mla_query"
# for every size within 4% of the best candidate of benchmarks/tune.py, on an H200
MLA_BLOCK_ROWS, MLA_NUM_WARPS = 2, 1


def indexer_configuration(num_rows: int) -> tuple[int, int]:
    """Return BLOCK_ROWS and num_warps for a number of rows."""
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
    """Prepare BLOCK_ROWS rows of 4 * HALF values. A token has HEADS rows.

    If BLOCK_ROWS divides HEADS, the rows of a program belong to one token and need no mask.
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
        # a position past the table must not become an address
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
    """Prepare queries as `fd_dsa.ops.query.indexer_query`, in one launch, to `out`."""
    num_rows = weights.shape[0] * weights.shape[1]
    if num_rows:
        block_rows, num_warps = indexer_configuration(num_rows)
        prepare_query_kernel[(-(-num_rows // block_rows),)](
            **indexer_query_arguments(q, weights, position_ids, cos_sin_cache, out, **how),
            BLOCK_ROWS=block_rows,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return out


def indexer_query_arguments(
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
    """Return the arguments of `prepare_query_kernel` by name, without BLOCK_ROWS.

    The launch must have `enable_fp_fusion=False`.

    Raises:
        ShapeError: the kernel has no tiles for a width.
    """
    num_tokens, heads, width = q.shape
    half = cos_sin_cache.shape[1] // 2
    if width != 4 * half or half & (half - 1):
        raise ShapeError(
            f"{_INDEXER}: a device needs index_head_dim = 2 * rope_dim, a power of two, "
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


@triton.jit
def rotated_pairs(
    x, token, inside, angle_rows_ptr, cos_sin_ptr, num_angles, HALF: tl.constexpr
):  # fmt: skip
    """Load HALF interleaved pairs of each row, and rotate them by the angles of its token.

    Args:
        x: pointers to the pairs of each row.
        token: token of each row, whose number is the row of the angles without `angle_rows_ptr`.
    """
    angle_row = token
    if angle_rows_ptr is not None:
        angle_row = tl.load(angle_rows_ptr + token, mask=inside, other=0).to(tl.int64)
        # a number past the table must not become an address
        angle_row = tl.minimum(tl.maximum(angle_row, 0), num_angles - 1)
    mask = inside[:, None]
    angle = (cos_sin_ptr + angle_row * (2 * HALF))[:, None] + tl.arange(0, HALF)[None, :]
    cos, sin = tl.load(angle, mask=mask), tl.load(angle + HALF, mask=mask)
    first, second = load_pairs(x[:, None], mask, HALF, True)
    return rotated(first, second, cos, sin)


@step_kernel(
    strided=("latent_ptr", "pe_ptr"),
    specialized=("latent_token_stride", "latent_head_stride", "pe_token_stride", "pe_head_stride"),
    waits=True,
)
def prepare_mla_query_kernel(
    latent_ptr,
    latent_token_stride,
    latent_head_stride,
    pe_ptr,
    pe_token_stride,
    pe_head_stride,
    position_ids_ptr,
    cos_sin_ptr,
    out_ptr,
    num_rows,
    num_positions,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Prepare BLOCK_ROWS rows of RANK + 2 * HALF values. A token has HEADS rows."""
    wait_for_inputs()
    start_next()
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < num_rows
    token, head, mask = row // HEADS, row % HEADS, inside[:, None]
    pe_row = pe_ptr + token * pe_token_stride + head * pe_head_stride
    first, second = rotated_pairs(
        pe_row, token, inside, position_ids_ptr, cos_sin_ptr, num_positions, HALF
    )
    column = tl.arange(0, PADDED_RANK)[None, :]
    copied = mask & (column < RANK)
    latent_row = latent_ptr + token * latent_token_stride + head * latent_head_stride
    latent = tl.load(latent_row[:, None] + column, mask=copied)

    out = (out_ptr + row * (RANK + 2 * HALF))[:, None]
    tl.store(out + column, latent, mask=copied)
    store_pairs(out + RANK, stored(first, out), stored(second, out), mask, HALF, True)


def prepare_mla_query(
    q_latent: Tensor,
    q_pe: Tensor,
    position_ids: Tensor | None,
    cos_sin_cache: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Prepare queries as `fd_dsa.ops.mla_query.prepare_mla_query`, in one launch."""
    num_tokens, num_heads, rank = q_latent.shape
    if out is None:
        out = q_latent.new_empty([num_tokens, num_heads, rank + q_pe.shape[2]])
    num_rows = num_tokens * num_heads
    if num_rows:
        prepare_mla_query_kernel[(-(-num_rows // MLA_BLOCK_ROWS),)](
            **mla_query_arguments(q_latent, q_pe, position_ids, cos_sin_cache, out),
            BLOCK_ROWS=MLA_BLOCK_ROWS,
            num_warps=MLA_NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out


def mla_query_arguments(
    q_latent: Tensor, q_pe: Tensor, position_ids: Tensor | None, cos_sin_cache: Tensor, out: Tensor
) -> dict[str, object]:
    """Return the arguments of `prepare_mla_query_kernel` by name, without BLOCK_ROWS.

    The launch must have `enable_fp_fusion=False`.

    Raises:
        ShapeError: the kernel does not support a width or stride.
    """
    num_tokens, num_heads, rank = q_latent.shape
    half = cos_sin_cache.shape[1] // 2
    if half & (half - 1) or rank % 2:
        raise ShapeError(
            f"{_MLA}: a device needs a power of two as rope_dim and an even kv_lora_rank, got "
            f"{2 * half} and {rank}"
        )
    latent_strides = outer_strides(_MLA, "q_latent", q_latent)
    pe_strides = outer_strides(_MLA, "q_pe", q_pe)
    if any(stride % 2 for stride in pe_strides) or q_pe.data_ptr() % (2 * q_pe.element_size()):
        raise ShapeError(
            f"{_MLA}: heads of q_pe are {pe_strides} values apart, from address "
            f"{q_pe.data_ptr()}; a device needs both even, in values"
        )
    return {
        "latent_ptr": q_latent,
        "latent_token_stride": latent_strides[0],
        "latent_head_stride": latent_strides[1],
        "pe_ptr": q_pe,
        "pe_token_stride": pe_strides[0],
        "pe_head_stride": pe_strides[1],
        "position_ids_ptr": position_ids,
        "cos_sin_ptr": cos_sin_cache,
        "out_ptr": out,
        "num_rows": num_tokens * num_heads,
        "num_positions": 0 if position_ids is None else cos_sin_cache.shape[0],
        "HEADS": num_heads,
        "RANK": rank,
        "HALF": half,
        "PADDED_RANK": next_power_of_2(rank),
    }
