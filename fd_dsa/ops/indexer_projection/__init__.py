"""The indexer's projections of the hidden states: its keys and its head weights."""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops import unchecked
from fd_dsa.ops._host import check_array, check_dtype, check_shape, dtype_name
from fd_dsa.ops.providers import activation_dtypes

__all__ = ["project_indexer"]

_NAME = "project_indexer"


def project_indexer(
    hidden_states: Any,
    wk: Any,
    weights_proj: Any,
    out: tuple[Any, Any] | None = None,
    *,
    scratch: Any = None,
) -> tuple[Any, Any]:
    """Index keys and head weights of a step's tokens; one launch on a device.

    index_k = hidden_states @ wk, weights = hidden_states @ weights_proj

    Sums are float32, and the head weights stay so. The launch goes to the current stream; a product
    of Paddle goes to the stream that its cuBLAS handle was made on, which a fork does not change
    (PaddlePaddle/Paddle #79155). It makes nothing but its results, and the same
    bits every time.

    Launches of few tokens share scratch memory, one a device, so one must end before the next
    begins: on one stream, or on two with a join in between. Two at the same time, or graphs that
    are replayed at the same time, need a `scratch` each.

    Args:
        hidden_states: float32, on a device also bfloat16, [num_tokens, hidden_size]; may be a
            column slice of wider rows.
        wk: of the same dtype, [hidden_size, index_head_dim].
        weights_proj: of the same dtype, [hidden_size, index_n_heads]. Both may be column slices,
            as of one parameter.
        out: where to write the two results, on a device contiguous; None allocates.
        scratch: on a device memory of `scratch.new_scratch`; None is the device's own, made by
            the first launch outside of a capture.

    Returns:
        index_k [num_tokens, index_head_dim] of the dtype of the hidden states, as `write_caches`
        takes it, and weights float32 [num_tokens, index_n_heads], as `prepare_indexer_query`.

    Raises:
        ShapeError, DtypeError: before any work.
        BackendUnavailable: the device has no kernel.

    Source: one product for both weights, sgl-project/sglang #12094; on a second stream, vLLM
    #39943.
    """
    check_shape(_NAME, "hidden_states", hidden_states, (None, None))
    check_dtype(_NAME, "hidden_states", hidden_states, activation_dtypes(hidden_states))
    same = (dtype_name(hidden_states.dtype),)
    num_tokens, hidden_size = hidden_states.shape
    check_array(_NAME, "wk", wk, (hidden_size, None), same)
    check_array(_NAME, "weights_proj", weights_proj, (hidden_size, None), same)
    if out is not None:
        if not isinstance(out, tuple | list) or len(out) != 2:
            raise ShapeError(f"{_NAME}: out is no pair, allowed are keys and weights, or None")
        check_array(_NAME, "out[0]", out[0], (num_tokens, wk.shape[1]), same)
        check_array(_NAME, "out[1]", out[1], (num_tokens, weights_proj.shape[1]), ("float32",))
    return unchecked.project_indexer(hidden_states, wk, weights_proj, out, scratch)
