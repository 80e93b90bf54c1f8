"""Grouped GEMM of routed experts in MXFP4 by the CUDA C++ kernel of custom_ops/.

The kernel reads rows in FP8, as the released models do. The FP8 tensor cores have twice the rate of
those for bfloat16. Triton's kernel does not round activations. The sums of a row do not depend on
other rows.

With few pairs an expert, the first GEMM writes rows in FP8, so that no launch has to quantise them
for the second one. These rows have a scale for each 64 values, one of a tile's columns. Both GEMMs
of more pairs have bfloat16 between them and a scale for each 128 values. Batch-invariant mode
always has that form.
"""

from __future__ import annotations

import ctypes

from fd_dsa.ops.dense_kernels import GROUP, values_and_scales
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.four_bit_kernel import FourBitKernel
from fd_dsa.ops.library_kernel import hopper_kernel
from fd_dsa.tensor import FourBitWeight, Fp8Rows, Tensor

HALF = GROUP // 2
"""Number of values that share a scale in rows between both GEMMs, with few pairs."""
# With a smaller mean number of pairs, the launcher has tiles for few pairs.
_FEW_PAIRS = 16
_INPUTS = "x", "x_scales", "peaks", "weight", "weight_scales", "factors", "pairs", "counts"
_NUMBERS = (
    *("num_tokens", "num_pairs", "row_pairs", "num_experts", "width", "columns", "x_group"),
    *("is_gated", "starts_early"),
)


class Fp4Experts(ctypes.Structure):
    """FdDsaExpertGemmFp4 of custom_ops/csrc/expert_gemm_fp4.h, which describes the fields."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in (*_INPUTS, "out", "out_scales", "taken")),
        *((n, ctypes.c_int64) for n in ("num_rows", "x_stride", "out_stride")),
        ("limit", ctypes.c_float),
        *((n, ctypes.c_int32) for n in _NUMBERS),
    )


class Fp4ExpertGemm(FourBitKernel):
    """Kernel of a loaded library for `four_bit_gemm.four_bit_gemm` with MXFP4 weights."""

    launcher, size = "fd_dsa_expert_gemm_fp4_cuda", "fd_dsa_expert_gemm_fp4_bytes"
    structure = Fp4Experts
    forms, tile_columns, chunk_values = (("e8m0", 32),), GROUP, 16

    def __call__(
        self,
        x: Fp8Rows,
        weight: FourBitWeight,
        pairs: Tensor,
        counts: Tensor,
        out: Tensor | Fp8Rows,
        limit: float | None,
    ) -> None:
        """Enqueue the GEMM, a launch, with a memset before it for many pairs.

        Args:
            x: rows, a multiple of 128 values each. A result with scales for 64 values is allowed.
            weight, pairs, counts, limit: as for `four_bit_gemm`.
            out: bfloat16 [pairs, columns], the result. A gated one with few pairs may be Fp8Rows
                with scales for 64 values.
        """
        job = self.job
        values, out_scales, job.out_stride = values_and_scales(out)
        self.bind(values)
        self._set_addresses(16, peaks=weight.peaks)
        self._set_addresses(x_scales=x.scales, out_scales=out_scales)
        job.x_stride, job.x_group = x.scales.shape[1], x.codes.shape[1] // x.scales.shape[0]
        self.launch_four_bits(x.codes, weight, pairs, counts, values, limit)


def writes_fp8(weight: FourBitWeight, num_pairs: int) -> bool:
    """Return True if the GEMM of a supported weight writes rows in FP8 for the second one."""
    experts, columns, _ = weight.shape
    parts = weight.codes.shape[1]
    # the second GEMM has these columns as its width
    return (
        parts == 2
        and columns // parts % GROUP == 0
        and num_pairs < _FEW_PAIRS * experts
        and not fixed_order()
    )


def kernel_for(x: Tensor) -> Fp4ExpertGemm | None:
    """Return the kernel for rows on their device, None to use Triton's. The choice is logged."""
    return hopper_kernel(Fp4ExpertGemm, x, "experts in MXFP4", depends_on_rows=False)
