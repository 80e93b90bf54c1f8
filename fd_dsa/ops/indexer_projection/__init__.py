"""The indexer's projections of the hidden states; it has no public form with checks.

index_k = hidden_states @ wk, weights = hidden_states @ weights_proj; one launch on a device

Sums are float32, and the head weights stay so. The launch goes to the current stream; a GEMM of
Paddle goes to the stream that its cuBLAS handle was made on, which a fork does not change
(PaddlePaddle/Paddle #79155). It allocates nothing, and has the same bits every time.

Launches of few tokens share scratch memory, one a device, so one must end before the next begins:
on one stream, or on two with a join in between. Two at the same time, or graphs that are replayed
at the same time, need a `scratch` each.

Args:
    hidden_states: float32, on a device also bfloat16, [num_tokens, hidden_size]; may be a column
        slice of wider rows.
    wk: of the same dtype, [hidden_size, index_head_dim]; None leaves the keys out.
    weights_proj: of the same dtype, [hidden_size, index_n_heads]. Both may be column slices, as of
        one parameter.
    out: where to write the two, on a device contiguous (a CPU allocates for None): index_k
        [num_tokens, index_head_dim] of the dtype of the hidden states, which stays as it is without
        `wk`, and weights float32 [num_tokens, index_n_heads].
    scratch: on a device memory of `_split_sums.new_scratch`; None is the device's own, made by
        the first launch outside of a capture.

Source: one GEMM for both weights, sgl-project/sglang #12094; on a second stream, vLLM #39943.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops.arrays import as_numpy, check_writable
from fd_dsa.ops.host_gemm import HostMatrix
from fd_dsa.tensor import Array


def project_on_host(
    hidden_states: Array, wk: Array | None, weights_proj: Array, out: tuple[Array, Array] | None
) -> tuple[Any, Any]:
    for index, array in enumerate(out or ()):
        check_writable("project_indexer", f"out[{index}]", array)
    x = as_numpy(hidden_states)
    results: list[Any] = [w if w is None else HostMatrix(w).times(x) for w in (wk, weights_proj)]
    if out is None:
        return results[0], results[1]
    for target, result in zip(out, results, strict=True):
        if result is not None:
            np.copyto(as_numpy(target), result)
    return out
