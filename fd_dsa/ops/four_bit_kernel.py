"""Limits and launch of the CUDA C++ kernels of custom_ops/ for experts in four bits."""

from __future__ import annotations

import math
from typing import ClassVar

from fd_dsa.ops.dense_kernels import GROUP
from fd_dsa.ops.expert_gemm_cuda import MAX_CHUNKS, MAX_EXPERTS, ExpertKernel
from fd_dsa.tensor import FourBitWeight, Tensor


class FourBitKernel(ExpertKernel):
    """Kernel of a loaded library for `four_bit_gemm.four_bit_gemm`.

    Its structure has the fields of custom_ops/csrc/expert_gemm_w4a16.h up to `is_gated`, and
    `starts_early`.

    Attributes:
        forms: kinds and groups of the weights.
        tile_columns: columns of a tile, of both parts of a gated weight.
        chunk_values: values of 16 bytes of a row of activations.
    """

    counted_pairs = 64
    forms: ClassVar[tuple[tuple[str, int], ...]]
    tile_columns: ClassVar[int]
    chunk_values: ClassVar[int]

    @classmethod
    def supports(cls, weight: FourBitWeight, num_rows: int) -> bool:
        """Return True if the kernel supports a weight and a number of rows."""
        experts, _, width = weight.shape
        parts, _, columns = weight.codes.shape[1:4]
        return (
            (weight.kind, weight.group) in cls.forms
            and width % GROUP == columns % (cls.tile_columns // parts) == 0
            and experts <= MAX_EXPERTS
            and num_rows * (width // cls.chunk_values) <= MAX_CHUNKS
        )

    def launch_four_bits(
        self,
        x: Tensor,
        weight: FourBitWeight,
        pairs: Tensor,
        counts: Tensor,
        out: Tensor,
        limit: float | None,
    ) -> None:
        """Set the fields that weights in four bits add to those of all experts, and launch.

        The caller binds `out` and sets the other fields first.

        Args:
            x: activations [rows, width], or their codes.
            weight, pairs, counts, limit: as for `four_bit_gemm`.
            out: result [pairs, columns], or its codes.
        """
        job = self.job
        self._set_addresses(16, weight_scales=weight.scales)
        self._set_addresses(factors=weight.factors)
        job.width, job.limit = weight.width, math.inf if limit is None else limit
        job.num_rows = x.shape[0]
        self.launch_experts(x, weight.codes, pairs, counts, out, weight.codes.shape[1] == 2)
