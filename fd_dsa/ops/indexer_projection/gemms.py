"""Projections of the indexer by Paddle's GEMMs, for a device that cannot compile our launch."""

from __future__ import annotations

import paddle

from fd_dsa.errors import BackendUnavailable
from fd_dsa.ops.arrays import matmul
from fd_dsa.ops.fixed_order import row_dependence_refusal
from fd_dsa.tensor import Tensor


def project_by_gemms(
    hidden_states: Tensor, wk: Tensor | None, weights_proj: Tensor, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """See `fd_dsa.ops.indexer_projection`; the head weights come from a GEMM in float32.

    It allocates, and runs on the current stream of the device only.

    Raises:
        BackendUnavailable: FD_DSA_BATCH_INVARIANT=1, whose sums no GEMM of Paddle makes.
    """
    if reason := row_dependence_refusal():
        raise BackendUnavailable(
            f"indexer_projection: Paddle's GEMMs cannot serve: {reason}; leave the variable out"
        )
    if wk is not None:
        paddle.assign(matmul(hidden_states, wk), output=out[0])
    wide = (paddle.cast(values, "float32") for values in (hidden_states, weights_proj))
    paddle.assign(matmul(*wide), output=out[1])
    return out
