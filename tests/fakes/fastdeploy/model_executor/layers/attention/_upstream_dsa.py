"""What `layers/attention/dsa_attention_backend.py` does in a step and in a layer.

Where a read waits for the device, a row counts as decoding because it has cached tokens, a
maximum is taken that nobody reads or all tokens go through two kernels, that is upstream's doing,
not the double's.
"""

from __future__ import annotations

from typing import Any

import paddle

from fastdeploy import _counters, _tree
from fastdeploy._arrays import host
from fastdeploy.model_executor.ops import gpu

from .ops import get_block_shape_and_split_kv_block

BLOCK_SIZE = 64


def prepare_step(backend: Any, forward_meta: Any) -> None:
    """The six maxima through a wait for the stream; with #7598 windows, fresh in every step."""
    buffer, on_host = backend.unused, backend.unused_cpu
    get_block_shape_and_split_kv_block(
        forward_meta.seq_lens_encoder,
        forward_meta.seq_lens_decoder,
        forward_meta.seq_lens_this_time,
        buffer,
        buffer,
        on_host,
        buffer,
        buffer,
        forward_meta.max_len_tensor_cpu,
        buffer,
        buffer,
        on_host,
        buffer,
        buffer,
        on_host,
        -1,
        -1,
        -1,
        backend.block_size,
    )
    if _tree.current().mask_offsets:
        forward_meta.indexer_attn_mask_offsets = _windows(forward_meta)


def _windows(forward_meta: Any) -> Any:
    """int32 [2T] (start, end) of #7598, whose kernel ends at once for decode rows.

    The memory is taken and zeroed, and the kernel launched, in decode-only steps too; the ends
    count this step's keys alone.
    """
    offsets = paddle.zeros([2 * forward_meta.ids_remove_padding.shape[0]], dtype="int32")
    _counters.launch("indexer_attn_mask_offsets")
    starts, prefill = host(forward_meta.cu_seqlens_q), host(forward_meta.seq_lens_encoder)
    values = host(offsets)
    for row, num_tokens in enumerate(prefill.reshape(-1)[: len(starts) - 1]):
        first = int(starts[row])
        for token in range(first, first + int(num_tokens)):
            values[2 * token : 2 * token + 2] = first, token + 1
    return offsets


def attend(
    backend: Any,
    q: Any,
    k: Any,
    v: Any,
    compressed_kv: Any,
    k_pe: Any,
    layer: Any,
    forward_meta: Any,
) -> Any:
    """Write this step's records, then run the prefill kernel, the decode kernel, or both."""
    cache = forward_meta.caches[2 * layer.layer_id]
    _write(compressed_kv, k_pe, cache, forward_meta)
    maxima = host(forward_meta.max_len_tensor_cpu)
    prefill = decode = None
    if maxima[1]:
        prefill = _prefill(backend.attn_softmax_scale, q, k, v)
    # the largest cached length of all rows: also true for later chunks, and for idle rows' rest
    if maxima[2]:
        decode = _decode(backend.attn_softmax_scale, backend.kv_lora_rank, q, v, cache)
    if prefill is None:
        return decode if decode is not None else paddle.zeros([0, q.shape[1], backend.kv_lora_rank])
    if decode is not None:
        gpu.merge_prefill_decode_output(
            prefill,
            decode,
            forward_meta.seq_lens_encoder,
            forward_meta.seq_lens_decoder,
            forward_meta.seq_lens_this_time,
            forward_meta.cu_seqlens_q,
            q.shape[1] * 4,
            128,
            1,
        )
    return prefill


def attend_static(
    q: Any,
    indices: Any,
    compressed_kv: Any,
    k_pe: Any,
    cache: Any,
    forward_meta: Any,
    softmax_scale: float,
) -> Any:
    """The form of June 2026: heads padded to 64, and of rows with cached tokens one token each."""
    gpu.dsk_attn_write_cache(
        compressed_kv, k_pe, cache, forward_meta.slot_mapping, None, "fp8_ds_mla"
    )
    num_tokens, heads = q.shape[:2]
    padding = -heads % 64
    if padding:
        q = paddle.concat([q, paddle.zeros([num_tokens, padding, q.shape[2]], q.dtype)], axis=1)
    maxima = host(forward_meta.max_len_tensor_cpu)
    out = paddle.zeros([num_tokens, heads + padding, compressed_kv.shape[-1]], q.dtype)
    if maxima[1]:
        rope = k_pe.reshape([num_tokens, -1])
        keys = paddle.concat([compressed_kv, rope], axis=-1).unsqueeze(1)
        out = _prefill(softmax_scale, q, keys, indices)
    if maxima[2]:
        # which rows they are is read back
        _counters.sync("where")
        cached = host(forward_meta.seq_lens_decoder).reshape(-1) > 0
        starts = paddle.to_tensor(host(forward_meta.cu_seqlens_q)[:-1][cached]).to(q.place)
        out[starts] = _decode(softmax_scale, out.shape[-1], q[starts], indices[starts], cache)
    return out[:, :heads]


def _write(compressed_kv: Any, k_pe: Any, cache: Any, forward_meta: Any) -> None:
    for kernel in ("abs", "max", "divide"):
        _counters.launch(f"kv_scale.{kernel}")
    scale = paddle.abs(compressed_kv).max() / 200
    gpu.dsk_attn_write_cache(
        compressed_kv, k_pe, cache, forward_meta.slot_mapping, scale, "fp8_ds_mla"
    )


def _prefill(softmax_scale: float, q: Any, k: Any, v: Any) -> Any:
    """Every token of the step over this step's keys; indices are places among them."""
    import flash_mla

    return flash_mla.flash_mla_sparse_fwd(q, k, v, softmax_scale)[0]


def _decode(softmax_scale: float, rank: int, q: Any, v: Any, cache: Any) -> Any:
    """Every token of the step over the cache; indices are slots, whatever wrote them."""
    import flash_mla

    pages = cache.transpose([0, 2, 1, 3])
    schedule, _ = flash_mla.get_mla_metadata()
    out, _ = flash_mla.flash_mla_with_kvcache(
        q.unsqueeze(1),
        pages,
        None,
        None,
        rank,
        schedule,
        None,
        softmax_scale,
        False,
        True,
        v,
    )
    return out.reshape([q.shape[0], q.shape[1], rank])
