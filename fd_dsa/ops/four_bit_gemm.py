"""Grouped GEMM of routed experts in four bits."""

from __future__ import annotations

from fd_dsa.errors import LaunchError, ShapeError
from fd_dsa.ops.arrays import values_of
from fd_dsa.ops.dense_kernels import empty_beside, empty_fp8_rows, quantize_rows
from fd_dsa.ops.expert_gemm import block_sizes, configuration, expert_gemm_kernel
from fd_dsa.ops.expert_gemm_fp4_cuda import HALF, Fp4ExpertGemm, kernel_for, suits, writes_fp8
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.split_sums import Tiling, rows_of_tiles
from fd_dsa.tensor import FourBitWeight, Fp8Rows, Normed, Tensor
from fd_dsa.triton_runtime import next_power_of_2
from fd_dsa.triton_runtime.device_api import traits_for


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
    With few pairs an expert, its gated result is in FP8 too, for the experts' second GEMM.

    Args:
        x: bfloat16 [num_tokens, width] or [num_tokens * top_k, width], contiguous. Or such a
            result in FP8.
        pairs, counts, top_k, limit: as for `expert_gemm`.
        tiling: tiling of Triton's kernel. None selects it by the shape, and may use the kernel of
            custom_ops/.

    Raises:
        LaunchError: `x` is Fp8Rows, and Triton's kernel multiplies.
        ShapeError: rows and weight have different widths.
    """
    (experts, columns, width), gated = weight.shape, weight.codes.shape[1] == 2
    columns //= 1 + gated
    rows = x.codes if isinstance(x, Fp8Rows) else values_of(x)
    if rows.shape[1] != width:
        raise ShapeError(f"rows: got {rows.shape[1]} values, allowed: {width}, as the weight has")
    num_tokens = pairs.shape[1]
    num_pairs = num_tokens * top_k
    by_library: Fp4ExpertGemm | None = None
    if tiling is None and num_pairs and columns and suits(weight, rows.shape[0]):
        by_library = kernel_for(rows)
    out: Tensor | Fp8Rows
    if by_library is not None and writes_fp8(weight, num_pairs):
        out = empty_fp8_rows(rows, num_pairs, columns, HALF)
    else:
        out = empty_beside(rows, num_pairs, columns, dtype="bfloat16")
    if by_library is not None:
        by_library(_in_fp8(x), weight, pairs, counts, out, limit)
    elif num_pairs and columns:
        if isinstance(x, Fp8Rows):
            raise LaunchError("four_bit_gemm: Triton's kernel reads no rows in FP8; pass bfloat16")
        shape = rows_of_tiles(num_pairs), experts, gated, columns, traits_for(rows).shared_bytes
        tiling = tiling or configuration(weight.kind, *shape)
        options = block_sizes(weight.kind, columns, width, tiling)
        max_tiles = min(experts, num_pairs) + num_pairs // tiling.rows
        expert_gemm_kernel[-(-columns // options["BLOCK_COLUMNS"]), max_tiles](
            rows, None, weight.codes, weight.scales, weight.factors, pairs, counts, out, None,
            num_tokens, 0, 0, ROW_PAIRS=num_pairs // rows.shape[0], NUM_EXPERTS=experts,
            WIDTH=width, COLUMNS=columns, GATED=gated, ROUND_SCALES=False, NATIVE=False,
            EXPERTS=next_power_of_2(experts), LIMIT=limit, GROUP=weight.group, KIND=weight.kind,
            **options,
        )  # fmt: skip
    return out


def _in_fp8(x: Tensor | Normed | Fp8Rows) -> Fp8Rows:
    """Return rows in FP8."""
    if isinstance(x, Fp8Rows):
        return x
    # Scales of a norm may be no powers of two, and chunks of a long step lack them. Bits in fixed
    # order do not depend on that.
    if isinstance(x, Normed) and not fixed_order():
        return x.fp8
    return quantize_rows(values_of(x), True)
