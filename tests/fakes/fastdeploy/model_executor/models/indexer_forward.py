"""Upstream's `Indexer.forward` (`models/deepseek_v3.py`), with the weaknesses tests point at.

Where a row counts as decoding because it has cached tokens, keys of earlier chunks are left out, a
loop over rows waits for the device, or a buffer is made anew in every layer, that is upstream's
doing, not the double's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fastdeploy import _counters, _tree
from fastdeploy._arrays import host, tensor_of
from fastdeploy.model_executor.layers.quantization.fp8_utils import per_token_group_quant_fp8
from fastdeploy.model_executor.ops import gpu

BLOCK_SIZE = 64


def extract_decoder_token_from_q(
    q: Any, weight: Any, cu_seqlens_q: Any, seq_lens_encoder: Any, seq_lens_decoder: Any
) -> tuple[Any, Any, Any]:
    """First token of every row with cached tokens, and the keys it sees: one token, `decoder + 1`.

    `seq_lens_encoder` is not looked at: a later chunk's first token is extracted too.
    """
    _counters.launch("extract_kernel")
    starts, cached = host(cu_seqlens_q), host(seq_lens_decoder).reshape(-1)
    found = [np.zeros((len(cached), one.shape[1]), host(one).dtype) for one in (q, weight)]
    lengths = np.zeros(len(cached), np.int32)
    for row in np.flatnonzero(cached > 0):
        lengths[row] = cached[row] + 1
        for out, values in zip(found, (host(q), host(weight)), strict=True):
            # past the last token the kernel reads whatever memory lies there
            out[row] = values[starts[row]] if starts[row] < len(values) else 0
    for one in (*found, lengths):
        _counters.allocation("extracted", one.nbytes)
    out_q, out_weight = (
        tensor_of(out, one.place, one.dtype) for out, one in zip(found, (q, weight), strict=True)
    )
    return out_q, out_weight, tensor_of(lengths, q.place)


def upstream_indexer_forward(
    indexer: Any, forward_meta: Any, hidden_states: Any, qr: Any, rotary_emb: Any
) -> Any:
    """int32 [num_tokens, index_topk]: places in this step's keys for prefill, slots for decode."""
    cache = forward_meta.caches[2 * indexer.layer_id + 1]
    q, k = _rotated(indexer, forward_meta, hidden_states, qr, rotary_emb)
    heads, dim = indexer.index_n_heads, indexer.index_head_dim
    q_fp8, q_scale = per_token_group_quant_fp8(
        q.reshape([-1, dim]),
        indexer.quant_block_size,
        column_major_scales=False,
        use_ue8m0=True,
    )
    q_fp8 = q_fp8.reshape([-1, heads, dim])
    weights = indexer.weights_proj(hidden_states).astype("float32")
    weights = weights * q_scale.reshape([-1, heads]) * indexer.softmax_scale * heads**-0.5
    top_k = paddle.full([q_fp8.shape[0], indexer.index_topk], -1, dtype="int32")
    gpu.indexer_k_quant_and_cache(
        k, cache, forward_meta.slot_mapping, indexer.quant_block_size, indexer.scale_fmt
    )
    lengths = host(forward_meta.max_len_tensor_cpu)
    if lengths[1]:
        _select_for_prefill(indexer, forward_meta, q_fp8, k, weights, cache, top_k)
    if lengths[2]:
        _select_for_decode(indexer, forward_meta, q_fp8, weights, cache, top_k)
    return top_k


def _rotated(
    indexer: Any, forward_meta: Any, hidden_states: Any, qr: Any, rotary_emb: Any
) -> tuple[Any, Any]:
    """Queries [tokens, heads, dim] and keys [tokens, dim], the first `rope_dim` values rotated."""
    parts = [indexer.rope_dim, indexer.index_head_dim - indexer.rope_dim]
    q = indexer.wq_b(qr).reshape([-1, indexer.index_n_heads, indexer.index_head_dim])
    q_pe, q_nope = q.split(parts, axis=-1)
    k_pe, k_nope = indexer.k_norm(indexer.wk(hidden_states)).split(parts, axis=-1)
    q_pe, k_pe = rotary_emb(forward_meta.position_ids, q_pe, k_pe.unsqueeze(1))
    k_pe = k_pe.reshape([-1, indexer.rope_dim])
    return paddle.concat([q_pe, q_nope], axis=-1), paddle.concat([k_pe, k_nope], axis=-1)


def _new_tokens(forward_meta: Any) -> Any:
    """Prefix sums of the step's tokens, which upstream takes for those of the rows' keys."""
    if _tree.current().cu_seqlens_k == "query":
        return forward_meta.cu_seqlens_k
    return forward_meta.cu_seqlens_q


def _windows(forward_meta: Any, num_tokens: int) -> tuple[Any, Any]:
    """Start and end of each prefill token's keys, int32 [num_tokens], in the step's own keys."""
    if _tree.current().mask_offsets:
        offsets = forward_meta.indexer_attn_mask_offsets
        return offsets[::2].contiguous(), offsets[1::2].contiguous()
    cu = _new_tokens(forward_meta)
    start, end = (paddle.zeros([num_tokens], dtype="int32") for _ in range(2))
    for row in range(forward_meta.seq_lens_this_time.shape[0]):
        # each comparison and each slice bound waits for the device
        if bool(forward_meta.seq_lens_encoder[row] > 0):
            first, last = int(cu[row]), int(cu[row + 1])
            start[first:last] = first
            end[first:last] = paddle.arange(first, last, dtype="int32") + 1
    return start, end


def _select_for_prefill(
    indexer: Any, forward_meta: Any, q_fp8: Any, k: Any, weights: Any, cache: Any, top_k: Any
) -> None:
    """Scores against the keys of this step alone, read back from the start of each row."""
    import deep_gemm

    tokens = k.shape[0]
    codes = paddle.zeros(k.shape, dtype="uint8")
    scales = paddle.zeros([tokens, 4], dtype="float32")
    gpu.cp_gather_indexer_k_quant_cache(
        cache, codes, scales, forward_meta.block_tables, _new_tokens(forward_meta)
    )
    scales = scales.flatten()[:tokens].contiguous()
    start, end = _windows(forward_meta, tokens)
    longest = (end - start).max().item()
    logits = deep_gemm.fp8_mqa_logits(
        q_fp8,
        (codes.view("float8_e4m3fn"), scales),
        weights,
        start,
        end,
        max_seqlen_k=longest,
        clean_logits=False,
    ).contiguous()
    none = (None,) * 4
    gpu.radix_topk_ragged_transform(
        logits, top_k, start, end - start, *none, 0, indexer.index_topk, 1
    )


def _select_for_decode(
    indexer: Any, forward_meta: Any, q_fp8: Any, weights: Any, cache: Any, top_k: Any
) -> None:
    """Scores of one token a row over the row's pages, idle and prefill rows included."""
    import deep_gemm

    width = indexer.index_n_heads * indexer.index_head_dim
    rows_q, rows_weight, lengths = extract_decoder_token_from_q(
        q_fp8.reshape([-1, width]),
        weights,
        forward_meta.cu_seqlens_q,
        forward_meta.seq_lens_encoder,
        forward_meta.seq_lens_decoder,
    )
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, BLOCK_SIZE, deep_gemm.get_num_sms())
    logits = deep_gemm.fp8_paged_mqa_logits(
        rows_q.reshape([-1, 1, indexer.index_n_heads, indexer.index_head_dim]),
        cache.unsqueeze(2),
        rows_weight,
        lengths,
        forward_meta.block_tables,
        schedule,
        indexer.max_model_len,
        clean_logits=True,
    ).contiguous()
    gpu.radix_topk_ragged_transform(
        logits,
        top_k,
        forward_meta.cu_seqlens_q,
        indexer.lengths,
        lengths,
        forward_meta.batch_id_per_token.reshape([-1]),
        forward_meta.block_tables,
        None,
        forward_meta.block_tables.shape[1],
        indexer.index_topk,
        1,
    )
