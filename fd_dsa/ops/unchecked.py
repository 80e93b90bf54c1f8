"""Operators of a layer without the checks of their public forms: for layers of the engine.

A layer calls these with what it made itself, some of them seven times a step.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.ops.providers import serving


def write_caches(kv_a: Any, index_k: Any, *others: Any) -> None:
    """See `fd_dsa.ops.cache_write.write_caches`."""
    serving("cache_write", index_k if kv_a is None else kv_a)(kv_a, index_k, *others)


def prepare_indexer_query(q: Any, *others: Any, **options: Any) -> tuple[Any, Any]:
    """See `fd_dsa.ops.query.indexer_query`; on a CPU `q` is overwritten, and without `out` values
    are returned instead of codes.
    """
    return serving("indexer_query", q)(q, *others, **options)  # type: ignore[no-any-return]


def prepare_mla_query(q_latent: Any, *others: Any) -> Any:
    """See `fd_dsa.ops.mla_query.prepare_mla_query`."""
    return serving("mla_query", q_latent)(q_latent, *others)


def project_indexer(hidden_states: Any, *others: Any, **options: Any) -> tuple[Any, Any]:
    """Index keys and head weights of a step's tokens; one launch on a device.

    index_k = hidden_states @ wk, weights = hidden_states @ weights_proj

    Sums are float32, and the head weights stay so. The launch goes to the current stream; a GEMM
    of Paddle goes to the stream that its cuBLAS handle was made on, which a fork does not change
    (PaddlePaddle/Paddle #79155). It allocates only its results, which have the same bits every
    time.

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
        takes it, and weights float32 [num_tokens, index_n_heads], as `indexer_query`.

    Source: one GEMM for both weights, sgl-project/sglang #12094; on a second stream, vLLM
    #39943.
    """
    return serving("indexer_projection", hidden_states)(hidden_states, *others, **options)  # type: ignore[no-any-return]
