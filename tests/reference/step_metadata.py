"""Oracle of a step's metadata: one loop over rows, one over their tokens.

Source: the definitions of DeepSeek Sparse Attention's step metadata, as PaddlePaddle/FastDeploy
#7367 (slots) and #7598 (windows) introduced them, the windows extended to cached prefixes.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def ref_step_metadata(
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
    seq_lens_this_time: Any,
    block_tables: Any,
    block_size: int,
    num_padded_tokens: int | None = None,
) -> dict[str, Any]:
    """All fields of a step by name, as NumPy arrays and integers.

    Args:
        seq_lens_encoder: [B] prefill tokens of the row, 0 for decode and idle rows.
        seq_lens_decoder: [B] tokens of the row already in the cache.
        seq_lens_this_time: [B] tokens of the row in this step.
        block_tables: [B, max_blocks] physical block of each logical block, -1 unused.
        block_size: tokens per block.
        num_padded_tokens: length of the token arrays; None = the number of tokens.

    Returns:
        dict with the names, dtypes and shapes of `fd_dsa.step.ForwardMeta`; `position_ids_int32`
        as of a builder that was asked for it.
    """
    encoder = [int(n) for n in seq_lens_encoder]
    decoder = [int(n) for n in seq_lens_decoder]
    this_time = [int(n) for n in seq_lens_this_time]
    has_prefill = any(n > 0 for n in encoder)

    cu_seqlens_q, cu_seqlens_kg = [0], [0]
    batch_ids, positions, slots, offsets = [], [], [], []
    num_prefill_tokens = num_decode_tokens = max_seqlen_k = 0
    for b, (new_prefill, cached, n) in enumerate(zip(encoder, decoder, this_time, strict=True)):
        is_prefill = new_prefill > 0
        is_decode = n > 0 and not is_prefill
        key_start = cu_seqlens_kg[-1]
        for j in range(n):
            position = cached + j
            block = int(block_tables[b][position // block_size])
            batch_ids.append(b)
            positions.append(position)
            slots.append(block * block_size + position % block_size)
            offsets += [key_start, key_start + position + 1] if is_prefill else [0, 0]
        cu_seqlens_q.append(cu_seqlens_q[-1] + n)
        cu_seqlens_kg.append(key_start + (cached + n if is_prefill else n))
        num_prefill_tokens += n if is_prefill else 0
        num_decode_tokens += n if is_decode else 0
        if n > 0:
            max_seqlen_k = max(max_seqlen_k, cached + n)

    padding = 0 if num_padded_tokens is None else num_padded_tokens - len(slots)
    return {
        "seq_lens_encoder": np.array(encoder, np.int32),
        "seq_lens_decoder": np.array(decoder, np.int32),
        "seq_lens_this_time": np.array(this_time, np.int32),
        "cu_seqlens_q": np.array(cu_seqlens_q, np.int32),
        "block_tables": np.array(block_tables, np.int32),
        "batch_id_per_token": np.array(batch_ids + [-1] * padding, np.int32),
        "position_ids": np.array(positions + [0] * padding, np.int64),
        "position_ids_int32": np.array(positions + [0] * padding, np.int32),
        "slot_mapping": np.array(slots + [-1] * padding, np.int64),
        "indexer_attn_mask_offsets": (
            np.array(offsets + [0, 0] * padding, np.int32) if has_prefill else None
        ),
        "cu_seqlens_kg": np.array(cu_seqlens_kg, np.int32) if has_prefill else None,
        "num_prefill_tokens": num_prefill_tokens,
        "num_decode_tokens": num_decode_tokens,
        "max_seqlen_k": max_seqlen_k,
    }
