"""Launch that the CUDA C++ kernels of custom_ops/ for experts in four bits share."""

from __future__ import annotations

import math

from fd_dsa.environment import launches_overlap
from fd_dsa.ops.dense_kernels import empty_beside
from fd_dsa.ops.library_kernel import LibraryKernel
from fd_dsa.tensor import FourBitWeight, Tensor

# From this mean number of pairs of an expert on, a counter in memory gives tiles to blocks.
_MANY_PAIRS = 64


class FourBitKernel(LibraryKernel):
    """Kernel of a loaded library for `four_bit_gemm.four_bit_gemm`.

    Its structure has the fields of custom_ops/csrc/expert_gemm_w4a16.h up to `is_gated`, and
    `starts_early`.
    """

    def launch_experts(
        self,
        x: Tensor,
        weight: FourBitWeight,
        pairs: Tensor,
        counts: Tensor,
        out: Tensor,
        limit: float | None,
    ) -> None:
        """Set the fields of the structure that both kernels have, and launch.

        The caller binds `out` and sets the other fields first.

        Args:
            x: activations [rows, width], or their codes.
            weight, pairs, counts, limit: as for `four_bit_gemm`.
            out: result [pairs, columns], or its codes.
        """
        job = self.job
        operands = {"x": x, "weight": weight.codes, "weight_scales": weight.scales, "out": out}
        for name, tensor in operands.items():
            setattr(job, name, self._address(name, tensor, multiple=16))
        factors = weight.factors
        job.factors = None if factors is None else self._address("factors", factors)
        job.pairs, job.counts = self._address("pairs", pairs), self._address("counts", counts)
        job.limit = math.inf if limit is None else limit
        job.num_rows, job.num_tokens, job.num_pairs = x.shape[0], pairs.shape[1], out.shape[0]
        job.row_pairs = out.shape[0] // x.shape[0]
        job.num_experts, _, job.width = weight.shape
        job.columns, job.is_gated = out.shape[1], weight.codes.shape[1] == 2
        job.starts_early, job.taken = launches_overlap(), None
        taken = None
        if job.num_pairs >= _MANY_PAIRS * job.num_experts:
            taken = empty_beside(out, 1, dtype="int32")
            job.taken = self._address("taken", taken)
        self.launch()
        # later work of the stream may take its memory again
        del taken
