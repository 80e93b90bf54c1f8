"""Case of a kernel of custom_ops/ for experts in four bits."""

from __future__ import annotations

import numpy as np

from tests.kernel_memory import KernelMemory
from tests.ops import test_four_bit_gemm
from tests.ops.four_bit_case import Form


class ExpertCase(test_four_bit_gemm.Case):
    """Rows with a scale for each column, experts of each token and a weight."""

    def __init__(
        self,
        m: KernelMemory,
        form: Form,
        ids: np.ndarray,
        gated: bool,
        columns: int,
        width: int,
        experts: int,
    ) -> None:
        sizes = {"columns": columns, "width": width, "experts": experts}
        # a row for each token of a gated GEMM, else one for each pair
        super().__init__(m, form, ids, gated=gated, row_pairs=not gated, **sizes)
        rng = np.random.default_rng(len(ids))
        self.x *= 2.0 ** rng.integers(-3, 3, (1, width)).astype(np.float32)
