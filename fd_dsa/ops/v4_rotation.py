"""Rotation of the last channels of DeepSeek-V4's keys and queries on a device."""

from __future__ import annotations

from fd_dsa.ops.dense_kernels import empty_beside
from fd_dsa.ops.device_functions import power_of, rotated, stored, widened
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.v4_records import quantized_rows
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

# heads that a program rotates
_HEADS = 16


@triton.jit
def load_angles(
    cos_sin_ptr, position, WIDTH: tl.constexpr, ROPE: tl.constexpr, PADDED: tl.constexpr, first=0
):
    """Return cos and sin of each pair of a row from channel `first` on.

    They are 1 and 0 in front of the last ROPE channels.
    """
    pair = tl.arange(0, PADDED // 2) + first // 2 - (WIDTH - ROPE) // 2
    inside = (pair >= 0) & (pair < ROPE // 2)
    row = cos_sin_ptr + position.to(tl.int64) * ROPE
    cos = tl.load(row + pair, mask=inside, other=1.0)
    return cos, tl.load(row + ROPE // 2 + pair, mask=inside, other=0.0)


@triton.jit
def rotate_rows(x, cos, sin):
    """Rotate the pairs (2j, 2j + 1) of the rows of `x` [N, M] by angles [M / 2]."""
    rows: tl.constexpr = x.shape[0]
    half: tl.constexpr = x.shape[1] // 2
    first, second = tl.split(tl.reshape(x, [rows, half, 2]))
    first, second = rotated(first, second, cos[None, :], sin[None, :])
    return tl.reshape(tl.join(first, second), [rows, 2 * half])


@step_kernel(strided=("x_ptr", "weights_ptr"), waits=True)
def rotate_heads_kernel(
    x_ptr,
    cos_sin_ptr,
    positions_ptr,
    weights_ptr,
    out_ptr,
    out_weights_ptr,
    num_heads,
    STRIDE: tl.constexpr,
    WEIGHTS_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Rotate heads of group `program 1` of token `program 0`."""
    wait_for_inputs()
    start_next()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, PADDED)
    is_head = head < num_heads
    mask = is_head[:, None] & (channel < WIDTH)[None, :]
    at = head[:, None] * WIDTH + channel[None, :]
    cos, sin = load_angles(cos_sin_ptr, tl.load(positions_ptr + token), WIDTH, ROPE, PADDED)
    weights = tl.load(weights_ptr + token * WEIGHTS_STRIDE + head, mask=is_head, other=0.0)
    x = rotate_rows(widened(tl.load(x_ptr + token * STRIDE + at, mask=mask, other=0.0)), cos, sin)
    out_ptr += token * num_heads * WIDTH
    if out_ptr.dtype.element_ty == tl.uint8:
        codes, exponents = quantized_rows(x)
        tl.store(out_ptr + at, codes, mask=mask)
        weights *= power_of(exponents)
    else:
        tl.store(out_ptr + at, stored(x, out_ptr), mask=mask)
    tl.store(out_weights_ptr + token * num_heads + head, weights, mask=is_head)


def rotate_heads(
    x: Tensor, weights: Tensor, cos_sin: Tensor, positions: Tensor, *, as_codes: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate the last channels of an indexer's queries.

    Args:
        x: [num_tokens, num_heads * width]; there may be gaps between rows.
        weights: float32 [num_tokens, num_heads], weights of the heads' scores; likewise.
        as_codes: make e4m3 codes of the queries. Their scales become factors of the weights.

    Returns:
        The queries [num_tokens, num_heads, width], of the type of `x` or uint8; and the weights.
    """
    (tokens, columns), heads = x.shape, weights.shape[1]
    width = columns // heads
    out = empty_beside(x, tokens, heads, width, dtype="uint8" if as_codes else None)
    out_weights = empty_beside(weights, tokens, heads)
    if tokens:
        rotate_heads_kernel[tokens, -(-heads // _HEADS)](
            x, cos_sin, positions, weights, out, out_weights, heads,
            STRIDE=x.strides[0], WEIGHTS_STRIDE=weights.strides[0], WIDTH=width,
            ROPE=cos_sin.shape[1], HEADS=_HEADS, PADDED=next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return out, out_weights
