"""The grouped GEMM of routed experts by the CUDA C++ kernel of custom_ops/, for prompts in FP8.

It is for Hopper, and for experts that have many pairs: tiles are 128 rows, whatever is in them. A
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
from fd_dsa.ops.library_kernel import LibraryKernel, shared_kernel, why_not_compiled
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.device_api import traits_for

logger = logging.getLogger(__name__)

MANY_PAIRS = 32
"""Mean number of an expert's pairs from which on the kernel serves."""
# sizes that the launcher takes, see csrc/expert_gemm.cu
_MOST_EXPERTS, _MOST_WEIGHT_ROWS, _MOST_CHUNKS = 1024, 2**31 - 1, 2**32 - 1
_HOPPER = 90
_ADDRESSES = ("x", "x_scales", "weight", "weight_scales", "pairs", "counts", "out", "out_scales")
_SIZES = ("num_tokens", "num_pairs", "row_pairs", "num_experts", "width", "columns")


class Experts(ctypes.Structure):
    """FdDsaExpertGemm of custom_ops/csrc/expert_gemm.h, which says what each field is."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in (*_ADDRESSES, "taken")),
        *((n, ctypes.c_int64) for n in ("x_stride", "out_stride")),
        *((n, ctypes.c_int32) for n in (*_SIZES, "is_gated", "round_scales")),
    )


class ExpertGemm(LibraryKernel):
    """`_expert_kernels.expert_gemm` of a loaded library, for operands in FP8."""

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
        """Fill `out`, and `out_scales` of a gated GEMM, which for others is None.

        `x` and `weight` are codes and scales, see `expert_gemm`; `taken` is int32 [1], of this
        launch alone. Cost: a memset and one launch; no allocation, no wait.
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
    """Whether the kernel takes these sizes, and is made for so many pairs of an expert."""
    return (
        num_pairs >= MANY_PAIRS * num_experts
        and width % GROUP == columns % GROUP == 0
        and num_experts <= _MOST_EXPERTS
        and 2 * num_experts * columns <= _MOST_WEIGHT_ROWS
        and num_rows * (width // 16) <= _MOST_CHUNKS
    )


def kernel_for(codes: Tensor) -> ExpertGemm | None:
    """The kernel for codes on their device; None: Triton's serves. Logged once a device."""
    reason = row_dependence_refusal() or why_not_compiled() or unsupported_reason(codes)
    return _kernel_for(custom_ops.build().kernels, reason)


@cache
def _kernel_for(kernels: ctypes.CDLL | None, reason: str) -> ExpertGemm | None:
    """What serves with a library, unless there is a reason against it."""
    found = None
    if not reason and kernels is None:
        reason = f"{custom_ops.PACKAGE} is {custom_ops.build().state}"
    if not reason:
        try:
            found = shared_kernel(ExpertGemm, kernels)
        except BackendUnavailable as error:
            reason = str(error)
    served = "custom_op" if found else f"triton (not custom_op: {reason})"
    logger.info("experts of %d pairs and more on average, in FP8: %s", MANY_PAIRS, served)
    return found


def unsupported_reason(codes: Tensor) -> str:
    """Why the kernel does not run where a tensor is; "" if it does."""
    capability = traits_for(codes).capability
    return "" if capability == _HOPPER else f"the GPU is of capability {capability}, not {_HOPPER}"
