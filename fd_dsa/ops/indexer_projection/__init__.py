"""Projections of the hidden states to the indexer's keys and head weights.

index_k = hidden_states @ wk, weights = hidden_states @ weights_proj

The layers of the engine call a provider's function directly, so this operator has no public
function with checks. Sums are float32, and so are the head weights.

On a device both products are one launch on the current stream. It allocates no memory and gives the
same bits every time. A GEMM of Paddle would run on the stream of its cuBLAS handle, which a fork
does not change (PaddlePaddle/Paddle #79155).

Launches of few tokens share the scratch memory of their device. So a launch must end before the
next one begins: on one stream, or on two streams with a join between. Concurrent launches or graphs
need a `scratch` each.

Args:
    hidden_states: float32, on a device also bfloat16, [num_tokens, hidden_size]; may be columns of
        wider rows.
    wk: of the same dtype, [hidden_size, index_head_dim]; None leaves the keys out.
    weights_proj: of the same dtype, [hidden_size, index_n_heads]. Both weights may be columns of
        one parameter.
    out: memory of the two results, on a device contiguous; on a CPU None allocates. index_k
        [num_tokens, index_head_dim] has the dtype of the hidden states, and is unchanged without
        `wk`. weights is float32 [num_tokens, index_n_heads].
    scratch: on a device memory of `split_sums.new_scratch`; None = the device's own, which the
        first launch outside of a capture makes.

Source: one GEMM for both weights, sgl-project/sglang #12094; on a second stream, vLLM #39943.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.errors import BackendUnavailable
from fd_dsa.ops.arrays import as_numpy, check_writable, matmul
from fd_dsa.ops.fixed_order import row_dependence_refusal
from fd_dsa.ops.host_gemm import HostMatrix
from fd_dsa.tensor import Array, Tensor


def project_on_host(
    hidden_states: Array, wk: Array | None, weights_proj: Array, out: tuple[Array, Array] | None
) -> tuple[Any, Any]:
    """Project on a CPU by GEMMs of HostMatrix."""
    for index, array in enumerate(out or ()):
        check_writable("project_indexer", f"out[{index}]", array)
    x = as_numpy(hidden_states)
    results: list[Any] = [w if w is None else HostMatrix(w).matmul(x) for w in (wk, weights_proj)]
    if out is None:
        return results[0], results[1]
    for target, result in zip(out, results, strict=True):
        if result is not None:
            np.copyto(as_numpy(target), result)
    return out


def project_by_gemms(
    hidden_states: Tensor, wk: Tensor | None, weights_proj: Tensor, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Project on a device by two GEMMs of Paddle, if our kernel cannot be compiled.

    The GEMM of the head weights is float32. Both GEMMs allocate memory, and run on the current
    stream of the device only.

    Raises:
        BackendUnavailable: FD_DSA_BATCH_INVARIANT=1, because Paddle's GEMMs have no fixed order of
            sums.
    """
    if reason := row_dependence_refusal():
        raise BackendUnavailable(
            f"indexer_projection: Paddle's GEMMs cannot serve: {reason}; leave the variable out"
        )
    import paddle

    if wk is not None:
        paddle.assign(matmul(hidden_states, wk), output=out[0])
    wide = (paddle.cast(values, "float32") for values in (hidden_states, weights_proj))
    paddle.assign(matmul(*wide), output=out[1])
    return out
