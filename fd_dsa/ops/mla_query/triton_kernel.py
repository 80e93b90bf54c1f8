"""Queries of MLA on a device: copy of the latents and RoPE in one launch.

A row is one head of one token. A program takes BLOCK_ROWS rows, which are contiguous in the result
whatever the tokens they belong to; strides locate them in the inputs.
"""

from __future__ import annotations

from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import outer_strides
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.triton_fp8 import load_pairs, rotated, store_pairs, stored
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

_NAME = "prepare_mla_query"
# BLOCK_ROWS and num_warps: of those that benchmarks/tune.py times, the best or within 4% of it
# for every size on an H200
BLOCK_ROWS, NUM_WARPS = 2, 1


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
    """See `prepare_mla_query`; rows of RANK + 2 * HALF values, HEADS of them a token."""
    wait_for_inputs()
    start_next()
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < num_rows
    token, head = row // HEADS, row % HEADS
    angle_row = token
    if position_ids_ptr is not None:
        angle_row = tl.load(position_ids_ptr + token, mask=inside, other=0)
        # a position past the table must not be an address
        angle_row = tl.minimum(tl.maximum(angle_row, 0), num_positions - 1)
    mask = inside[:, None]
    angle = (cos_sin_ptr + angle_row * (2 * HALF))[:, None] + tl.arange(0, HALF)[None, :]
    cos, sin = tl.load(angle, mask=mask), tl.load(angle + HALF, mask=mask)
    pe_row = (pe_ptr + token * pe_token_stride + head * pe_head_stride)[:, None]
    first, second = load_pairs(pe_row, mask, HALF, True)
    column = tl.arange(0, PADDED_RANK)[None, :]
    copied = mask & (column < RANK)
    latent_row = latent_ptr + token * latent_token_stride + head * latent_head_stride
    latent = tl.load(latent_row[:, None] + column, mask=copied)

    out = (out_ptr + row * (RANK + 2 * HALF))[:, None]
    tl.store(out + column, latent, mask=copied)
    first, second = rotated(first, second, cos, sin)
    store_pairs(out + RANK, stored(first, out), stored(second, out), mask, HALF, True)


def prepare_mla_query(
    q_latent: Tensor,
    q_pe: Tensor,
    position_ids: Tensor | None,
    cos_sin_cache: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """See `fd_dsa.ops.mla_query.prepare_mla_query`."""
    num_tokens, num_heads, rank = q_latent.shape
    if out is None:
        out = q_latent.new_empty([num_tokens, num_heads, rank + q_pe.shape[2]])
    num_rows = num_tokens * num_heads
    if num_rows:
        prepare_mla_query_kernel[(-(-num_rows // BLOCK_ROWS),)](
            **kernel_arguments(q_latent, q_pe, position_ids, cos_sin_cache, out),
            BLOCK_ROWS=BLOCK_ROWS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out


def kernel_arguments(
    q_latent: Tensor, q_pe: Tensor, position_ids: Tensor | None, cos_sin_cache: Tensor, out: Tensor
) -> dict[str, object]:
    """Arguments of `prepare_mla_query_kernel` by name, but for BLOCK_ROWS; launch without fusion.

    Raises:
        ShapeError: a width or strides that the kernel has no form for.
    """
    num_tokens, num_heads, rank = q_latent.shape
    half = cos_sin_cache.shape[1] // 2
    if half & (half - 1) or rank % 2:
        raise ShapeError(
            f"{_NAME}: a device needs a power of two as rope_dim and an even kv_lora_rank, got "
            f"{2 * half} and {rank}"
        )
    latent_strides = outer_strides(_NAME, "q_latent", q_latent)
    pe_strides = outer_strides(_NAME, "q_pe", q_pe)
    if any(stride % 2 for stride in pe_strides) or q_pe.data_ptr() % (2 * q_pe.element_size()):
        raise ShapeError(
            f"{_NAME}: heads of q_pe are {pe_strides} values apart, from address "
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
        "PADDED_RANK": triton.next_power_of_2(rank),
    }
