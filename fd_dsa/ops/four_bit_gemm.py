"""Grouped GEMM of routed experts in four bits."""

from __future__ import annotations

from fd_dsa.errors import LaunchError, ShapeError
from fd_dsa.ops import expert_gemm_fp4_cuda, expert_gemm_w4a16_cuda
from fd_dsa.ops.arrays import values_of
from fd_dsa.ops.dense_kernels import empty_beside, empty_fp8_rows, quantize_rows
from fd_dsa.ops.expert_gemm import launch_grouped
from fd_dsa.ops.expert_gemm_fp4_cuda import HALF, Fp4ExpertGemm, writes_fp8
from fd_dsa.ops.expert_gemm_w4a16_cuda import W4a16ExpertGemm
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.split_sums import Tiling
from fd_dsa.tensor import FourBitWeight, Fp8Rows, Normed, Tensor


def four_bit_gemm(
    x: Tensor | Normed | Fp8Rows,
    weight: FourBitWeight,
    pairs: Tensor,
    counts: Tensor,
    *,
    top_k: int,
    tiling: Tiling | None = None,
    limit: float | None = None,
) -> Tensor | Fp8Rows:
    """Multiply as `expert_gemm` does, by a weight in four bits: bfloat16 [pairs, columns].

    A weight of two parts is a gated one. The kernel of custom_ops/ for MXFP4 reads rows in FP8.
    With few pairs an expert, its gated result is in FP8 too, for the experts' second GEMM. Another
    kernel of custom_ops/ multiplies NVFP4 and INT4 by bfloat16, with several pairs an expert.

    Args:
        x: bfloat16 [num_tokens, width] or [num_tokens * top_k, width], contiguous. Or such a
            result in FP8.
        pairs, counts, top_k, limit: as for `expert_gemm`.
        tiling: tiling of Triton's kernel. None selects it by the shape, and may use a kernel of
            custom_ops/.

    Raises:
        LaunchError: `x` is Fp8Rows, and the kernel for MXFP4 does not multiply.
        ShapeError: rows and weight have different widths.
    """
    (_, columns, width), gated = weight.shape, weight.codes.shape[1] == 2
    columns //= 1 + gated
    rows = x.codes if isinstance(x, Fp8Rows) else values_of(x)
    if rows.shape[1] != width:
        raise ShapeError(f"rows: got {rows.shape[1]} values, allowed: {width}, as the weight has")
    num_pairs = pairs.shape[1] * top_k
    kernel = None
    if tiling is None and num_pairs and columns:
        kernel = _library_kernel(weight, rows, num_pairs)
    if isinstance(kernel, Fp4ExpertGemm) and writes_fp8(weight, num_pairs):
        codes = empty_fp8_rows(rows, num_pairs, columns, HALF)
        kernel(_in_fp8(x), weight, pairs, counts, codes, limit)
        return codes
    out = empty_beside(rows, num_pairs, columns, dtype="bfloat16")
    if isinstance(kernel, Fp4ExpertGemm):
        kernel(_in_fp8(x), weight, pairs, counts, out, limit)
    elif isinstance(x, Fp8Rows):
        raise LaunchError("four_bit_gemm: only the kernel for MXFP4 reads rows in FP8")
    elif kernel is not None:
        kernel(rows, weight, pairs, counts, out, limit)
    elif num_pairs and columns:
        launch_grouped(rows, weight, pairs, counts, out, tiling, gated=gated, limit=limit)
    return out


def _library_kernel(
    weight: FourBitWeight, rows: Tensor, num_pairs: int
) -> Fp4ExpertGemm | W4a16ExpertGemm | None:
    """Return the kernel of custom_ops/ for a weight, None for Triton's."""
    if Fp4ExpertGemm.supports(weight, rows.shape[0]):
        return expert_gemm_fp4_cuda.kernel_for(rows)
    if expert_gemm_w4a16_cuda.suits(weight, rows.shape[0], num_pairs):
        return expert_gemm_w4a16_cuda.kernel_for(rows)
    return None


def _in_fp8(x: Tensor | Normed | Fp8Rows) -> Fp8Rows:
    """Return rows in FP8."""
    if isinstance(x, Fp8Rows):
        return x
    # Scales of a norm may be no powers of two, and chunks of a long step lack them. Bits in fixed
    # order do not depend on that.
    if isinstance(x, Normed) and not fixed_order():
        return x.fp8
    return quantize_rows(values_of(x), True)
