"""Write this step's keys of a layer into its two paged caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fd_dsa.ops._fp8 import (
    INDEX_RECORD_BYTES,
    INDEX_WIDTH,
    LATENT_RECORD_BYTES,
    LATENT_WIDTH,
    ROPE_WIDTH,
)
from fd_dsa.ops._host import check_dtype, check_shape
from fd_dsa.ops._provider import PADDLE, TRITON, provider_for

__all__ = ["CacheWriteParams", "write_caches"]

_CACHE_DTYPES = {
    "float32": ("float32",),
    # on a CPU bfloat16 is held as its bits
    "bfloat16": ("int16", "bfloat16"),
    "fp8_ds_mla": ("uint8",),
}
# Paddle's CPU build and NumPy do not compute in bfloat16
_INPUT_DTYPES = {PADDLE: ("float32",), TRITON: ("float32", "bfloat16")}


@dataclass(frozen=True, slots=True)
class CacheWriteParams:
    """What `write_caches` does to the keys of a layer before they are stored.

    Attributes:
        kv_cache_dtype: "float32", "bfloat16" or "fp8_ds_mla".
        kv_norm_weight: float32 [kv_lora_rank], RMSNorm of the latent; None = already normed.
        kv_norm_eps: added to the mean square.
        k_norm_weight, k_norm_bias: float32 [index_head_dim], LayerNorm of the index key; None =
            already normed.
        k_norm_eps: added to the variance.
        index_rope_interleave: pairing of the index key's RoPE; the latent's is interleaved.
        index_hadamard: rotate the index key by a 128-point Walsh-Hadamard matrix.
        index_scale_fmt: scales of the index keys in an fp8_ds_mla cache: "ue8m0" or None.

    `index_hadamard` and `index_scale_fmt` must be those of the queries that read the cache.
    """

    kv_cache_dtype: str
    kv_norm_weight: Any = None
    kv_norm_eps: float = 1e-6
    k_norm_weight: Any = None
    k_norm_bias: Any = None
    k_norm_eps: float = 1e-6
    index_rope_interleave: bool = False
    index_hadamard: bool = False
    index_scale_fmt: str | None = "ue8m0"


def write_caches(
    kv_a: Any,
    index_k: Any,
    position_ids: Any,
    slot_mapping: Any,
    cos_sin_cache: Any,
    latent_cache: Any,
    index_cache: Any,
    params: CacheWriteParams,
) -> None:
    """Norm, rotate, quantise and store the keys of a step's tokens; one launch on a device.

    latent: c = RMSNorm(kv_a[:, :kv_lora_rank]), k_pe = RoPE(kv_a[:, kv_lora_rank:])
    index:  k = LayerNorm(index_k), RoPE of its first rope_dim values, Hadamard where asked for

    All of it in float32, sums of the norms in float64, nothing rounded before it is stored; so
    a CPU and a device write the same bytes. An fp8_ds_mla record of the latent has 656 bytes:
    512 e4m3 codes, 4 float32 scales (one a 128 values), 64 bfloat16 of k_pe. A block of the
    index cache has 64 keys of 128 e4m3 codes, then 64 float32 scales.

    Args:
        kv_a: float32, on a device also bfloat16, [num_tokens, kv_lora_rank + rope_dim]; a column
            slice of a wider projection is allowed; None writes the index key alone.
        index_k: like `kv_a`, [num_tokens, index_head_dim]; None = no indexer, or written already.
        position_ids: int64 [num_tokens]; rows of `cos_sin_cache`. None = row t belongs to token t,
            as where a step gathers them once for all layers.
        slot_mapping: int64 [num_tokens]; block * block_size + offset. A slot below 0 or past the
            cache is not written.
        cos_sin_cache: float32 [max_position, rope_dim], cos in the first half, sin in the second;
            None = already rotated.
        latent_cache: [num_blocks, 1, block_size, row]: float32 or int16 (bfloat16 bits) with row =
            kv_lora_rank + rope_dim, or uint8 with row = 656. None with `kv_a`.
        index_cache: [num_blocks, block_size, row]: row = index_head_dim, or uint8 with row = 132.
            None with `index_k`.
        params: the layer's norms and the format.

    Raises:
        ShapeError, DtypeError: before anything is written.
        BackendUnavailable: the device has no kernel.

    Source: FlashMLA (README, "FP8 KV cache"), DeepGEMM's paged index cache, vLLM's
    concat_and_cache_ds_mla and indexer_k_quant_and_cache for the two formats.
    """
    chosen = provider_for("cache_write", index_k if kv_a is None else kv_a)
    arguments = (kv_a, index_k, position_ids, slot_mapping, cos_sin_cache)
    _check(*arguments, _INPUT_DTYPES[chosen])
    _check_caches(kv_a, index_k, latent_cache, index_cache, params)
    if chosen == TRITON:
        from fd_dsa.ops.cache_write import triton_kernel as provider
    else:
        from fd_dsa.ops.cache_write import paddle_impl as provider
    provider.write_caches(*arguments, latent_cache, index_cache, params)


def _check(
    kv_a: Any,
    index_k: Any,
    position_ids: Any,
    slot_mapping: Any,
    cos_sin_cache: Any,
    floats: tuple[str, ...],
) -> None:
    """Refuse inputs of a wrong shape or dtype."""
    name = "write_caches"
    check_dtype(name, "slot_mapping", slot_mapping, ("int64",))
    check_shape(name, "slot_mapping", slot_mapping, (None,))
    num_tokens = slot_mapping.shape[0]
    for argument, value in (("kv_a", kv_a), ("index_k", index_k)):
        if value is not None:
            check_shape(name, argument, value, (num_tokens, None))
            check_dtype(name, argument, value, floats)
    if cos_sin_cache is not None:
        rows = num_tokens if position_ids is None else None
        check_shape(name, "cos_sin_cache", cos_sin_cache, (rows, None))
        check_dtype(name, "cos_sin_cache", cos_sin_cache, ("float32",))
    if position_ids is not None:
        check_shape(name, "position_ids", position_ids, (num_tokens,))
        check_dtype(name, "position_ids", position_ids, ("int64",))


def _check_caches(
    kv_a: Any, index_k: Any, latent_cache: Any, index_cache: Any, params: CacheWriteParams
) -> None:
    """Refuse caches of another dtype than the format's, or of another row than the keys'."""
    name, fp8 = "write_caches", params.kv_cache_dtype == "fp8_ds_mla"
    allowed = _CACHE_DTYPES[params.kv_cache_dtype]
    if kv_a is not None:
        if fp8:
            check_shape(name, "kv_a", kv_a, (None, LATENT_WIDTH + ROPE_WIDTH))
        row = LATENT_RECORD_BYTES if fp8 else kv_a.shape[1]
        check_shape(name, "latent_cache", latent_cache, (None, 1, None, row))
        check_dtype(name, "latent_cache", latent_cache, allowed)
    if index_k is not None:
        if fp8:
            check_shape(name, "index_k", index_k, (None, INDEX_WIDTH))
        row = INDEX_RECORD_BYTES if fp8 else index_k.shape[1]
        check_shape(name, "index_cache", index_cache, (None, None, row))
        check_dtype(name, "index_cache", index_cache, allowed)
