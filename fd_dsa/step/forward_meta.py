"""Contract between the builder of a step and its readers."""

from __future__ import annotations

from dataclasses import dataclass

from fd_dsa.tensor import StepArray


@dataclass(frozen=True, slots=True, eq=False)
class ForwardMeta:
    """Metadata of one step for attention: built once, read by every layer, never changed.

    B = rows of the step, T = padded token count, n_b = `seq_lens_this_time[b]`,
    d_b = `seq_lens_decoder[b]`. The j-th token of row b is t = `cu_seqlens_q[b]` + j.
    A row is *prefill* iff `seq_lens_encoder[b]` > 0 (first or later chunk, with or without a
    cached prefix), *decode* iff it is not prefill and n_b > 0, and *idle* iff n_b = 0.

    Padding. Tokens from `cu_seqlens_q[B]` on have batch id -1, position 0, slot -1 and window
    (0, 0). A slot of -1 is never written.

    Prefill fields. `indexer_attn_mask_offsets` and `cu_seqlens_kg` are None in a step without a
    prefill token. A consumer that finds None in a step with prefill tokens raises
    `MissingStepError`, see `fd_dsa.ops.key_bounds.prompt_windows`. A prefill token t of row b sees
    the positions from ks - cu_seqlens_kg[b] up to and without ke - cu_seqlens_kg[b].

    Lifetime. The arrays are views of the builder's buffers: valid until its next `build`, at the
    same addresses in every step. Where a build was given device tensors, the three lengths and
    `block_tables` are those tensors: valid as long as the caller leaves them alone. Two objects are
    equal only if they are the same object.
    """

    # int32 [B]: new prefill tokens of row b in this step; 0 for a decode or idle row
    seq_lens_encoder: StepArray
    # int32 [B]: tokens of row b in the cache before this step, prefix hits and chunks included
    seq_lens_decoder: StepArray
    # int32 [B]: tokens of row b in this step; 0 = idle
    seq_lens_this_time: StepArray
    # int32 [B + 1]: prefix sums of seq_lens_this_time
    cu_seqlens_q: StepArray
    # int32 [B, max_blocks]: physical block of each logical block; -1 = unused
    block_tables: StepArray
    # int32 [T]: row of token t; -1 = padding
    batch_id_per_token: StepArray
    # int64 [T]: d_b + j; 0 = padding
    position_ids: StepArray
    # int32 [T] or None: the same numbers, where the builder was made with `int32_position_ids`
    position_ids_int32: StepArray | None
    # int64 [T]: block_tables[b, p // bs] * bs + p % bs for p = position_ids[t]; -1 = padding
    slot_mapping: StepArray
    # int32 [2 T] or None: ks, ke of each token, half-open, into the step's gathered keys:
    # ks = cu_seqlens_kg[b], ke = ks + d_b + j + 1 for a prefill token, (0, 0) for all others
    indexer_attn_mask_offsets: StepArray | None
    # int32 [B + 1] or None: prefix sums of the gathered keys, d_b + n_b for a prefill row and
    # n_b (reserved, never filled) for any other
    cu_seqlens_kg: StepArray | None
    # host int: tokens of prefill rows
    num_prefill_tokens: int
    # host int: tokens of decode rows
    num_decode_tokens: int
    # host int: largest d_b + n_b of the rows that are not idle, or an upper bound of it
    max_seqlen_k: int
