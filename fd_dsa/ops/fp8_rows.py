"""Activations in block FP8: rows of e4m3 codes, and a scale for each 128 values of a row.

The scales are stored group by group, as cuBLASLt reads them (VEC128_32F): a GEMM takes those of its
rows for 128 values along K in one read.

Source: DeepSeek-V3 (arXiv 2412.19437) §3.3.2, fine-grained quantization.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fd_dsa.ops.cublaslt import padded_rows
from fd_dsa.ops.device_functions import absolute_maximum, magnitude, over_448, quotient, to_e4m3
from fd_dsa.tensor import Tensor

import triton  # isort: skip
import triton.language as tl  # isort: skip

GROUP = 128
"""Values of a row that share a scale; a weight has one for each GROUP x GROUP block."""
_GROUP = tl.constexpr(GROUP)


class Fp8Rows(NamedTuple):
    """Rows of FP8 values: value c of row r is e4m3(codes[r, c]) * scales[c // 128, r].

    Attributes:
        codes: uint8 [rows, width], e4m3 bits, contiguous.
        scales: float32 [ceil(width / 128), padded_rows(rows)], contiguous; columns from `rows` on
            hold anything.
        padded: `codes` and rows after them, as many as `scales` has columns, which hold anything;
            None where there is no such memory.
    """

    codes: Any
    scales: Any
    padded: Any = None


def empty_fp8_rows(beside: Tensor, rows: int, width: int) -> Fp8Rows:
    """Uninitialised Fp8Rows on the device of a tensor."""
    import paddle

    place = beside.place
    groups, stride = -(-width // GROUP), padded_rows(rows)
    padded = paddle.empty([stride, width], "uint8", device=place)
    scales = paddle.empty([groups, stride], "float32", device=place)
    return Fp8Rows(padded if rows == stride else padded[:rows], scales, padded)


def places_of(x: Tensor | Fp8Rows | None) -> tuple[Any, Any, Any, int]:
    """A tensor, or codes and scales of Fp8Rows, and the step from a group's scales to the next."""
    if isinstance(x, Fp8Rows):
        return None, x.codes, x.scales, x.scales.shape[1]
    return x, None, None, 0


@triton.jit
def quantized(groups, ROUND_SCALES: tl.constexpr):
    """uint8 codes of `groups` of values [N, M], and the float32 scale of each, [N].

    A scale is a 448th of its group's largest magnitude, at least 1e-12; with ROUND_SCALES up to a
    power of two.
    """
    scale = tl.maximum(over_448(absolute_maximum(magnitude(groups), 1)), 1e-12)
    if ROUND_SCALES:
        bits = scale.to(tl.uint32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.uint32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    return to_e4m3(quotient(groups, scale[:, None])), scale


@triton.jit
def store_groups(
    values, codes, scales, stride, left, BLOCK: tl.constexpr, ROUND_SCALES: tl.constexpr
):
    """Quantise the first `left` of `values` [BLOCK], part of a row; those past them are zero.

    `codes` and `scales` point to the first code and the first scale; `stride` is from one group's
    scale to the next one's.
    """
    groups: tl.constexpr = BLOCK // _GROUP
    own, scale = quantized(tl.reshape(values, [groups, _GROUP]), ROUND_SCALES)
    group = tl.arange(0, groups)
    tl.store(scales + group * stride, scale, mask=group * _GROUP < left)
    column = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    tl.store(codes + column, own, mask=column < left)
