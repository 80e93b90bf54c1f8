"""Grouped GEMM of routed experts in NVFP4 or INT4 by the CUDA C++ kernel of custom_ops/.

Like Triton's kernel, the kernel turns codes into bfloat16 and does not round activations. Its tiles
are large, so Triton's kernel is faster with few pairs of an expert. The sums of a row do not depend
on other rows. Batch-invariant mode uses this kernel for any number of pairs.
"""

from __future__ import annotations

import ctypes

from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.four_bit_kernel import FourBitKernel
from fd_dsa.ops.library_kernel import hopper_kernel
from fd_dsa.tensor import FourBitWeight, Tensor

# Up to this mean number of pairs of an expert, Triton's kernel is faster on an H200. Triton's tiles
# grow at the same mean (`expert_gemm.configuration`), so no step needs the larger ones.
_FEW_PAIRS = {"e4m3": 24, "int4": 12}
_ADDRESSES = "x", "weight", "weight_scales", "factors", "pairs", "counts", "out", "taken"
_NUMBERS = (
    *("num_tokens", "num_pairs", "row_pairs", "num_experts", "width", "columns"),
    *("is_gated", "is_integer", "starts_early"),
)


class W4a16Experts(ctypes.Structure):
    """FdDsaExpertGemmW4a16 of custom_ops/csrc/expert_gemm_w4a16.h, which describes the fields."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in _ADDRESSES),
        ("num_rows", ctypes.c_int64),
        ("limit", ctypes.c_float),
        *((n, ctypes.c_int32) for n in _NUMBERS),
    )


class W4a16ExpertGemm(FourBitKernel):
    """Kernel of a loaded library for `four_bit_gemm.four_bit_gemm` with NVFP4 or INT4 weights."""

    launcher, size = "fd_dsa_expert_gemm_w4a16_cuda", "fd_dsa_expert_gemm_w4a16_bytes"
    structure = W4a16Experts
    forms, tile_columns, chunk_values = (("e4m3", 16), ("int4", 128)), 256, 8

    def __call__(
        self,
        x: Tensor,
        weight: FourBitWeight,
        pairs: Tensor,
        counts: Tensor,
        out: Tensor,
        limit: float | None,
    ) -> None:
        """Enqueue the GEMM, a launch, with a memset before it for many pairs.

        Args:
            x: bfloat16 rows, a multiple of 128 values each.
            weight, pairs, counts, limit: as for `four_bit_gemm`.
            out: bfloat16 [pairs, columns], the result.
        """
        self.bind(out)
        self.job.is_integer = weight.kind == "int4"
        self.launch_four_bits(x, weight, pairs, counts, out, limit)


def suits(weight: FourBitWeight, num_rows: int, num_pairs: int) -> bool:
    """Return True if the kernel supports a weight and a number of rows, and is the faster one."""
    if not W4a16ExpertGemm.supports(weight, num_rows):
        return False
    return num_pairs > _FEW_PAIRS[weight.kind] * weight.shape[0] or fixed_order()


def kernel_for(x: Tensor) -> W4a16ExpertGemm | None:
    """Return the kernel for rows on their device, None to use Triton's. The choice is logged."""
    nvfp4, int4 = _FEW_PAIRS["e4m3"], _FEW_PAIRS["int4"]
    served = f"experts of more than {nvfp4} pairs on average in NVFP4, or {int4} in INT4"
    return hopper_kernel(W4a16ExpertGemm, x, served, depends_on_rows=False)
