"""Grouped GEMM of routed experts by the CUDA C++ kernel of custom_ops/, for prompts in FP8.

The kernel is for Hopper and for experts with many pairs, because a tile always has 128 rows. A
tile's products over 128 values are scaled and added in the order of Triton's kernel.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

from fd_dsa.ops.dense_kernels import GROUP, empty_beside, values_and_scales
from fd_dsa.ops.library_kernel import LibraryKernel, hopper_kernel
from fd_dsa.tensor import Fp8Rows, Tensor

MANY_PAIRS = 32
"""Minimum mean number of pairs of an expert for this kernel."""
# limits of the launcher in csrc/expert_gemm.cu
MAX_EXPERTS, _MAX_WEIGHT_ROWS, MAX_CHUNKS = 1024, 2**31 - 1, 2**32 - 1
_ADDRESSES = ("x", "x_scales", "weight", "weight_scales", "pairs", "counts", "out", "out_scales")
_SIZES = ("num_tokens", "num_pairs", "row_pairs", "num_experts", "width", "columns")


class Experts(ctypes.Structure):
    """FdDsaExpertGemm of custom_ops/csrc/expert_gemm.h, which describes the fields."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in (*_ADDRESSES, "taken")),
        *((n, ctypes.c_int64) for n in ("x_stride", "out_stride")),
        *((n, ctypes.c_int32) for n in (*_SIZES, "is_gated", "round_scales")),
    )


class ExpertKernel(LibraryKernel):
    """Kernel of a loaded library for a grouped GEMM of experts.

    Attributes:
        counted_pairs: mean number of pairs of an expert from which on a counter in memory gives
            tiles to blocks.
    """

    counted_pairs: ClassVar[int]

    def launch_experts(
        self, x: Tensor, weight: Tensor, pairs: Tensor, counts: Tensor, out: Tensor, is_gated: bool
    ) -> None:
        """Set the fields of the structure that all these kernels have, and launch.

        The caller binds `out` and sets the other fields first.

        Args:
            x: activations [rows, width], or their codes.
            weight: values or codes of all experts.
            pairs, counts: as for `expert_gemm`.
            out: result [pairs, columns], or its codes.
        """
        job = self.job
        self._set_addresses(16, x=x, weight=weight, out=out)
        self._set_addresses(pairs=pairs, counts=counts)
        job.num_pairs, job.columns = out.shape
        job.num_tokens, job.row_pairs = pairs.shape[1], job.num_pairs // x.shape[0]
        job.num_experts, job.is_gated = weight.shape[0], is_gated
        taken = None
        if job.num_pairs >= self.counted_pairs * job.num_experts:
            taken = empty_beside(out, 1, dtype="int32")
        self._set_addresses(taken=taken)
        self.launch()
        # later work of the stream may take its memory again
        del taken


class ExpertGemm(ExpertKernel):
    """Kernel of a loaded library for `expert_gemm.expert_gemm` with operands in FP8."""

    launcher, size, structure = "fd_dsa_expert_gemm_cuda", "fd_dsa_expert_gemm_bytes", Experts
    counted_pairs = 0

    def __call__(
        self,
        x: Fp8Rows,
        weight: tuple[Tensor, Tensor],
        pairs: Tensor,
        counts: Tensor,
        out: Tensor | Fp8Rows,
        *,
        round_scales: bool,
    ) -> None:
        """Enqueue the GEMM, a memset and one launch.

        Args:
            x, weight, pairs, counts, round_scales: as for `expert_gemm`.
            out: [pairs, columns], the result: Fp8Rows of a gated GEMM, else bfloat16.
        """
        job = self.job
        values, out_scales, job.out_stride = values_and_scales(out)
        self.bind(values)
        self._set_addresses(x_scales=x.scales, weight_scales=weight[1], out_scales=out_scales)
        job.width, job.x_stride = weight[0].shape[2], x.scales.shape[1]
        job.round_scales = round_scales
        self.launch_experts(x.codes, weight[0], pairs, counts, values, out_scales is not None)


def suits(num_rows: int, num_pairs: int, num_experts: int, columns: int, width: int) -> bool:
    """Return True if the kernel supports these sizes, and experts have many pairs."""
    return (
        num_pairs >= MANY_PAIRS * num_experts
        and width % GROUP == columns % GROUP == 0
        and num_experts <= MAX_EXPERTS
        and 2 * num_experts * columns <= _MAX_WEIGHT_ROWS
        and num_rows * (width // 16) <= MAX_CHUNKS
    )


def kernel_for(codes: Tensor, limit: float | None = None) -> ExpertGemm | None:
    """Return the kernel for codes on their device, None to use Triton's. The choice is logged.

    Args:
        limit: as for `expert_gemm`. The kernel has none.
    """
    served, refusal = f"experts of {MANY_PAIRS} pairs and more on average, in FP8", ""
    if limit is not None:
        served, refusal = f"{served}, gated and clamped", "the kernel does not clamp"
    return hopper_kernel(ExpertGemm, codes, served, refusal=refusal)
