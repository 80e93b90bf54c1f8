"""Gather the index keys of a step's prefill rows into contiguous memory."""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops._fp8 import INDEX_RECORD_BYTES, INDEX_WIDTH
from fd_dsa.ops._host import check_array, check_dtype, check_shape
from fd_dsa.ops._provider import TRITON, provider_for

__all__ = ["gather_indexer_keys"]

_KEY_DTYPES = {
    "float32": ("float32",),
    # bfloat16 and its bits pass for each other
    "int16": ("int16", "bfloat16"),
    "bfloat16": ("int16", "bfloat16"),
    "uint8": ("uint8", "float8_e4m3fn"),
}


def gather_indexer_keys(
    index_cache: Any,
    block_tables: Any,
    cu_seqlens_kg: Any,
    seq_lens_encoder: Any,
    out_k: Any,
    out_scale: Any = None,
) -> None:
    """Copy the keys of each prefill row, cached prefix and this step's chunk, to `out_k`.

    out_k[cu_seqlens_kg[b] + p] = key at block_tables[b, p // block_size], p % block_size

    for p in [0, cu_seqlens_kg[b + 1] - cu_seqlens_kg[b]) and seq_lens_encoder[b] > 0. The rows
    that a decode row has reserved, and those from cu_seqlens_kg[B] on, are left as they are. On a
    device a key is left out whose page is no block of the cache, or whose row lies past `out_k`.

    Args:
        index_cache: [num_blocks, block_size, index_head_dim] float32 or bfloat16 (int16 bits on a
            CPU), or uint8 [num_blocks, block_size, 132], fp8_ds_mla.
        block_tables: int32 [num_rows, max_blocks].
        cu_seqlens_kg: int32 [num_rows + 1]; prefix sums of the gathered keys (ForwardMeta).
        seq_lens_encoder: int32 [num_rows]; prefill tokens of each row, 0 for the others.
        out_k: [num_keys, index_head_dim] like the cache; of fp8_ds_mla keys the e4m3 codes, uint8
            or float8_e4m3fn. `num_keys` is at least cu_seqlens_kg[B], which the host knows.
        out_scale: float32 [num_keys] for fp8_ds_mla keys, else None.

    Raises:
        ShapeError, DtypeError: before anything is written.
        ValueError: on a CPU, cu_seqlens_kg falls or ends past `out_k`, a prefill row's pages are
            no blocks of the cache, or an output is read-only; before anything is written.
        BackendUnavailable: the device has no kernel.

    Cost: one launch on a device, no wait of the host.
    Source: vLLM's cp_gather_indexer_k_quant_cache; DeepGEMM's fp8_mqa_logits reads the result.
    """
    _check_keys(index_cache, out_k, out_scale)
    name = "gather_indexer_keys"
    check_array(name, "block_tables", block_tables, (None, None), ("int32",))
    num_rows = block_tables.shape[0]
    for argument, found, shape in (
        ("cu_seqlens_kg", cu_seqlens_kg, (num_rows + 1,)),
        ("seq_lens_encoder", seq_lens_encoder, (num_rows,)),
    ):
        check_array(name, argument, found, shape, ("int32",))
    if provider_for("indexer_gather", index_cache) == TRITON:
        from fd_dsa.ops.indexer_gather import triton_kernel as provider
    else:
        from fd_dsa.ops.indexer_gather import paddle_impl as provider
    provider.gather_indexer_keys(
        index_cache, block_tables, cu_seqlens_kg, seq_lens_encoder, out_k, out_scale
    )


def _check_keys(index_cache: Any, out_k: Any, out_scale: Any) -> None:
    """Refuse outputs that do not hold the cache's keys."""
    name = "gather_indexer_keys"
    check_shape(name, "index_cache", index_cache, (None, None, None))
    check_dtype(name, "index_cache", index_cache, tuple(_KEY_DTYPES))
    dtype, width = str(index_cache.dtype).rpartition(".")[2], index_cache.shape[2]
    if dtype == "uint8":
        check_shape(name, "index_cache", index_cache, (None, None, INDEX_RECORD_BYTES))
        width = INDEX_WIDTH
    check_shape(name, "out_k", out_k, (None, width))
    check_dtype(name, "out_k", out_k, _KEY_DTYPES[dtype])
    if (dtype == "uint8") != (out_scale is not None):
        raise ShapeError(
            f"{name}: out_scale is {'missing' if out_scale is None else 'given'} for a cache of "
            f"{dtype}; only fp8_ds_mla keys (uint8) have scales"
        )
    if out_scale is not None:
        check_shape(name, "out_scale", out_scale, (out_k.shape[0],))
        check_dtype(name, "out_scale", out_scale, ("float32",))
