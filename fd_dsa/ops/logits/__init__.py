"""Lightning-indexer scores: I[t, s] = scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s])."""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops._fp8 import INDEX_RECORD_BYTES, INDEX_WIDTH
from fd_dsa.ops._host import (
    Scratch,
    as_numpy,
    check_array,
    check_dtype,
    check_shape,
    check_values,
)
from fd_dsa.ops.logits.paddle_impl import (
    PagedUnits,
    score_gathered,
    score_paged,
)

__all__ = ["PagedUnits", "indexer_logits", "paged_indexer_logits"]


def indexer_logits(
    q: Any, weights: Any, cache: Any, key_slots: Any, scratch: Scratch | None = None
) -> Any:
    """Scores of every query against the keys at `key_slots`, as a dense matrix.

    Args:
        q: float32 [num_queries, index_n_heads, index_head_dim], roped; for an fp8_ds_mla cache the
            values of `prepare_indexer_query`.
        weights: float32 [num_queries, index_n_heads]; head weights, all scale factors folded in.
        cache: [num_blocks, block_size, index_head_dim] float32 or int16 (bfloat16 bits), or uint8
            [num_blocks, 64, 132], fp8_ds_mla; only there do keys have scales.
        key_slots: int64 [num_keys]; block * block_size + offset, all in the cache.
        scratch: buffers to reuse between calls.

    Returns:
        float32 [num_queries, num_keys], a NumPy array, valid until the next call with `scratch`.
        Windows are applied by the reader.

    Raises:
        ShapeError, DtypeError, ValueError (a slot outside the cache): before any work.

    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2, eq. 1; the FP8 form is that of DeepGEMM's
    fp8_mqa_logits.
    """
    name = "indexer_logits"
    check_array(name, "q", q, (None, None, None), ("float32",))
    check_array(name, "weights", weights, tuple(q.shape[:2]), ("float32",))
    _check_cache(name, cache, (None, None, q.shape[2]))
    check_array(name, "key_slots", key_slots, (None,), ("int64",))
    slots = as_numpy(key_slots)
    check_values(name, "key_slots", slots, 0, cache.shape[0] * cache.shape[1])
    return score_gathered(q, weights, cache, slots, scratch or Scratch())


def paged_indexer_logits(
    q: Any, weights: Any, cache: Any, units: PagedUnits, scratch: Scratch | None = None
) -> Any:
    """Scores of the queries of decode rows against their own pages.

    Args:
        q: float32 [num_rows, queries_per_row, index_n_heads, index_head_dim].
        weights: float32 [num_rows, queries_per_row, index_n_heads].
        cache: as in `indexer_logits`.
        units: which blocks belong to which row; made once per step.
        scratch: buffers to reuse between calls.

    Returns:
        float32 [num_rows, queries_per_row, units.width], column = position in the row; columns
        past a row's keys hold garbage. A NumPy array, valid until the next call with `scratch`.

    Raises:
        ShapeError, DtypeError, ValueError (a unit's block outside the cache): before any work.
    """
    name = "paged_indexer_logits"
    check_array(name, "q", q, (units.num_rows, None, None, None), ("float32",))
    check_array(name, "weights", weights, tuple(q.shape[:3]), ("float32",))
    _check_cache(name, cache, (None, units.block_size, q.shape[3]))
    check_values(name, "units.blocks", units.blocks, 0, cache.shape[0])
    return score_paged(q, weights, cache, units, scratch or Scratch())


def _check_cache(operator: str, cache: Any, shape: tuple[int | None, int | None, int]) -> None:
    """Refuse a cache whose rows do not hold keys of the queries' width."""
    check_dtype(operator, "cache", cache, ("float32", "int16", "uint8"))
    if str(cache.dtype).endswith("uint8"):
        if shape[2] != INDEX_WIDTH:
            raise ShapeError(
                f"{operator}: an fp8_ds_mla cache has keys of {INDEX_WIDTH} values, q has "
                f"{shape[2]}"
            )
        # the float32 scale of each key lies in the same block
        shape = (*shape[:2], INDEX_RECORD_BYTES)
    check_shape(operator, "cache", cache, shape)
