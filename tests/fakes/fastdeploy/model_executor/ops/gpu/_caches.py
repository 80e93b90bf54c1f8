"""The two caches: custom_ops/gpu_ops/append_attn/ds_mla_cache_kernel.cu and sparse_indexer/."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdeploy import _counters, _fp8
from fastdeploy._arrays import host, writable

from ._checks import check_dtypes


def dsk_attn_write_cache(
    compressed_kv: Any,
    k_pe: Any,
    latent_cache: Any,
    slot_mapping: Any,
    scale: Any,
    kv_cache_dtype: str,
) -> None:
    """Write the records of this step's tokens; `scale` is not looked at in this format."""
    op = "dsk_attn_write_cache"
    _counters.launch(op)
    if kv_cache_dtype != "fp8_ds_mla":
        raise ValueError(f"{op}: kv_cache_dtype is {kv_cache_dtype!r}")
    check_dtypes(op, "int64", slot_mapping=slot_mapping)
    slots = host(slot_mapping)
    latent, rope = host(compressed_kv)[: len(slots)], host(k_pe).reshape(-1, _fp8.ROPE)
    kept = slots >= 0
    with writable(latent_cache) as cache:
        rows = cache.reshape(-1, _fp8.RECORD)
        rows[slots[kept]] = _fp8.latent_records(latent[kept], rope[: len(slots)][kept])


def indexer_k_quant_and_cache(
    k: Any, indexer_cache: Any, slot_mapping: Any, quant_block_size: int, scale_fmt: str
) -> None:
    """Write this step's indexer keys, codes and scales apart in each block."""
    op = "indexer_k_quant_and_cache"
    _counters.launch(op)
    if (quant_block_size, scale_fmt) != (_fp8.INDEX, "ue8m0"):
        raise ValueError(f"{op}: quant_block_size {quant_block_size}, scale_fmt {scale_fmt!r}")
    check_dtypes(op, "int64", slot_mapping=slot_mapping)
    slots = host(slot_mapping)
    kept = slots >= 0
    slots = slots[kept]
    codes, scales = _fp8.index_keys(host(k)[: len(kept)][kept])
    with writable(indexer_cache) as cache:
        planes = _fp8.index_planes(cache)
        planes[0][slots // _fp8.BLOCK, slots % _fp8.BLOCK] = codes
        planes[1][slots // _fp8.BLOCK, slots % _fp8.BLOCK] = scales


def cp_gather_indexer_k_quant_cache(
    indexer_cache: Any, dst_k: Any, dst_scale: Any, block_tables: Any, cu_seq_lens: Any
) -> None:
    """Gather rows' keys: the i-th of a row comes from the row's i-th position, always.

    The kernel takes the width of a scale group from `dst_scale`, which must be [n, 4]; the scales
    are its first n floats.
    """
    op = "cp_gather_indexer_k_quant_cache"
    _counters.launch(op)
    check_dtypes(op, "uint8|float8_e4m3fn", dst_k=dst_k)
    if list(dst_scale.shape) != [dst_k.shape[0], 4]:
        raise ValueError(f"{op}: dst_scale is {dst_scale.shape}, allowed is [{dst_k.shape[0]}, 4]")
    ends = host(cu_seq_lens).astype(np.int64)
    tokens = np.arange(min(dst_k.shape[0], int(ends[-1])))
    row = np.searchsorted(ends, tokens, side="right") - 1
    position = tokens - ends[row]
    block = host(block_tables)[row, position // _fp8.BLOCK]
    codes, scales = _fp8.index_planes(host(indexer_cache))
    with writable(dst_k) as keys, writable(dst_scale) as flat:
        keys[tokens] = codes[block, position % _fp8.BLOCK]
        flat.reshape(-1)[tokens] = scales[block, position % _fp8.BLOCK]
