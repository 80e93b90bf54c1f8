"""Grouped GEMM of routed experts in MXFP4 by the CUDA C++ kernel of custom_ops/.

The kernel reads rows in FP8, as the released models do. The FP8 tensor cores have twice the rate of
those for bfloat16. Triton's kernel does not round activations. The sums of a row do not depend on
other rows.
"""

from __future__ import annotations

import ctypes
import math

from fd_dsa.environment import launches_overlap
from fd_dsa.ops.dense_kernels import GROUP, empty_beside
from fd_dsa.ops.expert_gemm_cuda import MAX_CHUNKS, MAX_EXPERTS
from fd_dsa.ops.library_kernel import LibraryKernel, hopper_kernel
from fd_dsa.tensor import FourBitWeight, Fp8Rows, Tensor

# kind and group of the weights
_FORM = "e8m0", 32
_INPUTS = "x", "x_scales", "peaks", "weight", "weight_scales", "factors", "pairs", "counts"
_NUMBERS = (
    *("num_tokens", "num_pairs", "row_pairs", "num_experts", "width", "columns", "is_gated"),
    "starts_early",
)


class Fp4Experts(ctypes.Structure):
    """FdDsaExpertGemmFp4 of custom_ops/csrc/expert_gemm_fp4.h, which describes the fields."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in (*_INPUTS, "out", "taken")),
        *((n, ctypes.c_int64) for n in ("num_rows", "x_stride")),
        ("limit", ctypes.c_float),
        *((n, ctypes.c_int32) for n in _NUMBERS),
    )


class Fp4ExpertGemm(LibraryKernel):
    """Kernel of a loaded library for `four_bit_gemm.four_bit_gemm` with MXFP4 weights."""

    launcher, size = "fd_dsa_expert_gemm_fp4_cuda", "fd_dsa_expert_gemm_fp4_bytes"
    structure = Fp4Experts

    def __call__(
        self,
        x: Fp8Rows,
        weight: FourBitWeight,
        pairs: Tensor,
        counts: Tensor,
        out: Tensor,
        limit: float | None,
    ) -> None:
        """Enqueue the GEMM, a launch, with a memset before it for many pairs.

        Args:
            x: rows, a multiple of 128 values each.
            weight, pairs, counts, limit: as for `four_bit_gemm`.
            out: bfloat16 [pairs, columns], the result.
        """
        job = self.job
        self.bind(out)
        rows = x.codes.shape[0]
        # the launch uses it, and later work of the stream may take its memory again
        taken = empty_beside(out, 1, dtype="int32")
        operands = {"x": x.codes, "weight": weight.codes, "weight_scales": weight.scales}
        for name, tensor in {**operands, "peaks": weight.peaks, "out": out}.items():
            setattr(job, name, self._address(name, tensor, multiple=16))
        others = {"x_scales": x.scales, "factors": weight.factors, "pairs": pairs, "counts": counts}
        for name, tensor in {**others, "taken": taken}.items():
            setattr(job, name, self._address(name, tensor))
        job.limit = math.inf if limit is None else limit
        job.num_rows, job.x_stride = rows, x.scales.shape[1]
        job.num_tokens, job.num_pairs = pairs.shape[1], out.shape[0]
        job.row_pairs = out.shape[0] // rows
        job.num_experts, _, job.width = weight.shape
        job.columns, job.is_gated = out.shape[1], weight.codes.shape[1] == 2
        job.starts_early = launches_overlap()
        self.launch()


def suits(weight: FourBitWeight, num_rows: int) -> bool:
    """Return True if the kernel supports a weight and a number of rows."""
    experts, _, width = weight.shape
    parts, _, columns = weight.codes.shape[1:4]
    return (
        (weight.kind, weight.group) == _FORM
        and width % GROUP == columns % (GROUP // parts) == 0
        and experts <= MAX_EXPERTS
        and num_rows * (width // 16) <= MAX_CHUNKS
    )


def kernel_for(x: Tensor) -> Fp4ExpertGemm | None:
    """Return the kernel for rows on their device, None to use Triton's. The choice is logged."""
    return hopper_kernel(Fp4ExpertGemm, x, "experts in MXFP4", depends_on_rows=False)
