"""Grouped GEMM of routed experts in MXFP4 by the CUDA C++ kernel of custom_ops/, for prompts.

The kernel rounds activations to FP8 with a power of two as the scale of 128 values, as the released
models do. So the FP8 tensor cores multiply, which have twice the rate of bfloat16. Triton's kernel
does not round activations. The reading of the weights decides its time when there are few pairs.
"""

from __future__ import annotations

import ctypes
import math

from fd_dsa.ops.dense_kernels import GROUP, empty_beside
from fd_dsa.ops.expert_gemm_cuda import MAX_CHUNKS, MAX_EXPERTS
from fd_dsa.ops.library_kernel import LibraryKernel, hopper_kernel
from fd_dsa.tensor import FourBitWeight, Tensor

MANY_PAIRS = 32
"""Minimum mean number of pairs of an expert for this kernel."""
# kind and group of the weights
_FORM = "e8m0", 32
_INPUTS = "x", "codes", "code_scales", "peaks", "weight", "weight_scales", "factors"
_SIZES = ("num_rows", "num_tokens", "num_pairs", "row_pairs", "num_experts", "width", "columns")


class Fp4Experts(ctypes.Structure):
    """FdDsaExpertGemmFp4 of custom_ops/csrc/expert_gemm_fp4.h, which describes the fields."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in (*_INPUTS, "pairs", "counts", "out", "taken")),
        ("limit", ctypes.c_float),
        *((n, ctypes.c_int32) for n in (*_SIZES, "is_gated")),
    )


class Fp4ExpertGemm(LibraryKernel):
    """Kernel of a loaded library for `four_bit_gemm.four_bit_gemm` with MXFP4 weights."""

    launcher, size = "fd_dsa_expert_gemm_fp4_cuda", "fd_dsa_expert_gemm_fp4_bytes"
    structure = Fp4Experts

    def __call__(
        self,
        x: Tensor,
        weight: FourBitWeight,
        pairs: Tensor,
        counts: Tensor,
        out: Tensor,
        limit: float | None,
    ) -> None:
        """Enqueue the GEMM, a memset and two launches.

        Args:
            x, weight, pairs, counts, limit: as for `four_bit_gemm`.
            out: bfloat16 [pairs, columns], the result.
        """
        job = self.job
        self.bind(out)
        rows, width = x.shape
        # the launch uses them, and later work of the stream may take their memory again
        codes = empty_beside(x, rows, width, dtype="uint8")
        scales = empty_beside(x, width // GROUP, rows, dtype="float32")
        taken = empty_beside(x, 1, dtype="int32")
        operands = {"x": x, "codes": codes, "weight": weight.codes, "weight_scales": weight.scales}
        for name, tensor in {**operands, "peaks": weight.peaks, "out": out}.items():
            setattr(job, name, self._address(name, tensor, multiple=16))
        others = {"code_scales": scales, "factors": weight.factors}
        for name, tensor in {**others, "pairs": pairs, "counts": counts, "taken": taken}.items():
            setattr(job, name, self._address(name, tensor))
        job.limit = math.inf if limit is None else limit
        job.num_rows, job.num_tokens, job.num_pairs = rows, pairs.shape[1], out.shape[0]
        job.row_pairs = out.shape[0] // rows
        job.num_experts, _, job.width = weight.shape
        job.columns, job.is_gated = out.shape[1], weight.codes.shape[1] == 2
        self.launch()


def suits(weight: FourBitWeight, num_rows: int, num_pairs: int) -> bool:
    """Return True if the kernel supports a weight and rows, and experts have many pairs."""
    experts, _, width = weight.shape
    parts, _, columns = weight.codes.shape[1:4]
    return (
        (weight.kind, weight.group) == _FORM
        and num_pairs >= MANY_PAIRS * experts
        and width % GROUP == columns % (GROUP // parts) == 0
        and experts <= MAX_EXPERTS
        and num_rows * (width // 16) <= MAX_CHUNKS
    )


def kernel_for(x: Tensor) -> Fp4ExpertGemm | None:
    """Return the kernel for rows on their device, None to use Triton's. The choice is logged."""
    return hopper_kernel(
        Fp4ExpertGemm, x, f"experts of {MANY_PAIRS} pairs and more on average, in MXFP4"
    )
