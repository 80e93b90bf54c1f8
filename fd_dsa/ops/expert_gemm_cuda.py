"""Grouped GEMM of routed experts by the CUDA C++ kernel of custom_ops/, for prompts in FP8.

The kernel is for Hopper and for experts with many pairs, because a tile always has 128 rows. A
tile's products over 128 values are scaled and added in the order of Triton's kernel.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache

from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable
from fd_dsa.ops.dense_kernels import GROUP
from fd_dsa.ops.fixed_order import row_dependence_refusal
from fd_dsa.ops.library_kernel import LibraryKernel, interpreter_refusal, shared_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.device_api import traits_for

logger = logging.getLogger(__name__)

MANY_PAIRS = 32
"""Minimum mean number of pairs of an expert for this kernel."""
# limits of the launcher in csrc/expert_gemm.cu
_MAX_EXPERTS, _MAX_WEIGHT_ROWS, _MAX_CHUNKS = 1024, 2**31 - 1, 2**32 - 1
_HOPPER = 90
_ADDRESSES = ("x", "x_scales", "weight", "weight_scales", "pairs", "counts", "out", "out_scales")
_SIZES = ("num_tokens", "num_pairs", "row_pairs", "num_experts", "width", "columns")


class Experts(ctypes.Structure):
    """FdDsaExpertGemm of custom_ops/csrc/expert_gemm.h, which describes the fields."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in (*_ADDRESSES, "taken")),
        *((n, ctypes.c_int64) for n in ("x_stride", "out_stride")),
        *((n, ctypes.c_int32) for n in (*_SIZES, "is_gated", "round_scales")),
    )


class ExpertGemm(LibraryKernel):
    """Kernel of a loaded library for `expert_gemm.expert_gemm` with operands in FP8."""

    launcher, size, structure = "fd_dsa_expert_gemm_cuda", "fd_dsa_expert_gemm_bytes", Experts

    def __call__(
        self,
        x: tuple[Tensor, Tensor],
        weight: tuple[Tensor, Tensor],
        pairs: Tensor,
        counts: Tensor,
        out: Tensor,
        out_scales: Tensor | None,
        taken: Tensor,
        *,
        round_scales: bool,
    ) -> None:
        """Enqueue the GEMM, a memset and one launch.

        Args:
            x, weight: codes and scales, as for `expert_gemm`.
            out: result, or its codes for a gated GEMM.
            out_scales: scales of the result of a gated GEMM, else None.
            taken: int32 [1], scratch memory of only this launch.
        """
        job = self.job
        self.bind(out)
        for name, tensor in (("x", x[0]), ("weight", weight[0]), ("out", out)):
            setattr(job, name, self._address(name, tensor, multiple=16))
        others = {"x_scales": x[1], "weight_scales": weight[1], "pairs": pairs, "counts": counts}
        for name, tensor in {**others, "taken": taken}.items():
            setattr(job, name, self._address(name, tensor))
        gated, job.out_scales, job.out_stride = out_scales is not None, None, 0
        if out_scales is not None:
            job.out_scales = self._address("out_scales", out_scales)
            job.out_stride = out_scales.shape[1]
        job.x_stride = x[1].shape[1]
        job.num_tokens, job.num_pairs = pairs.shape[1], out.shape[0]
        job.row_pairs = out.shape[0] // x[0].shape[0]
        (job.num_experts, _, job.width), job.columns = weight[0].shape, out.shape[1]
        job.is_gated, job.round_scales = gated, round_scales
        self.launch()


def suits(num_rows: int, num_pairs: int, num_experts: int, columns: int, width: int) -> bool:
    """Return True if the kernel supports these sizes, and experts have many pairs."""
    return (
        num_pairs >= MANY_PAIRS * num_experts
        and width % GROUP == columns % GROUP == 0
        and num_experts <= _MAX_EXPERTS
        and 2 * num_experts * columns <= _MAX_WEIGHT_ROWS
        and num_rows * (width // 16) <= _MAX_CHUNKS
    )


def kernel_for(codes: Tensor) -> ExpertGemm | None:
    """Return the kernel for codes on their device, None to use Triton's. The choice is logged."""
    reason = row_dependence_refusal() or interpreter_refusal() or unsupported_reason(codes)
    return _kernel_for(custom_ops.build().kernels, reason)


@cache
def _kernel_for(kernels: ctypes.CDLL | None, reason: str) -> ExpertGemm | None:
    """Return the kernel of a library, None if there is a reason against it."""
    found = None
    if not reason and kernels is None:
        reason = f"{custom_ops.PACKAGE} is {custom_ops.build().state}"
    if not reason:
        try:
            found = shared_kernel(ExpertGemm, kernels)
        except BackendUnavailable as error:
            reason = str(error)
    provider = "custom_op" if found else f"triton (not custom_op: {reason})"
    logger.info("experts of %d pairs and more on average, in FP8: %s", MANY_PAIRS, provider)
    return found


def unsupported_reason(codes: Tensor) -> str:
    """Return why the device of a tensor does not support the kernel, "" if it does."""
    capability = traits_for(codes).capability
    return "" if capability == _HOPPER else f"the GPU is of capability {capability}, not {_HOPPER}"
