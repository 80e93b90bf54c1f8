"""Projections of the indexer by Paddle's GEMMs, for a device that cannot compile our launch."""

from __future__ import annotations

from typing import Any

import paddle

from fd_dsa.errors import BackendUnavailable
from fd_dsa.ops.arrays import matmul
from fd_dsa.ops.fixed_order import why_not_by_rows


def project_by_gemms(
    hidden_states: Any, wk: Any, weights_proj: Any, out: tuple[Any, Any]
) -> tuple[Any, Any]:
    """See `fd_dsa.ops.indexer_projection`; the head weights come from a GEMM in float32.

    It allocates, and runs on the current stream of the device only.

    Raises:
        BackendUnavailable: FD_DSA_BATCH_INVARIANT=1, whose sums no GEMM of Paddle makes.
    """
    if reason := why_not_by_rows():
        raise BackendUnavailable(
            f"indexer_projection: Paddle's GEMMs cannot serve: {reason}; leave the variable out"
        )
    if wk is not None:
        paddle.assign(matmul(hidden_states, wk), output=out[0])
    wide = (paddle.cast(values, "float32") for values in (hidden_states, weights_proj))
    paddle.assign(matmul(*wide), output=out[1])
    return out
