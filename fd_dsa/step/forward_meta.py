"""Contract between the builder of a step and its readers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fd_dsa.tensor import StepArray


@dataclass(frozen=True, slots=True, eq=False)
class ForwardMeta:
    """Metadata of one step for attention: built once, read by every layer, never changed.

    B = rows of the step, T = padded token count, n_b = `seq_lens_this_time[b]`,
    d_b = `seq_lens_decoder[b]`. The j-th token of row b is t = `cu_seqlens_q[b]` + j.
    A row is *idle* if n_b = 0, and *prefill* if `seq_lens_encoder[b]` > 0: a first or later chunk,
    with or without a cached prefix. Any other row is *decode*.

    Padding. Tokens from `cu_seqlens_q[B]` on have batch id -1, position 0, slot -1 and window
    (0, 0). A slot of -1 is never written.

    Prefill fields. `indexer_attn_mask_offsets` and `cu_seqlens_kg` are None in a step without a
    prefill token. A consumer that finds None in a step with prefill tokens raises
    `MissingStepError`, see `fd_dsa.ops.key_bounds.prompt_windows`. A prefill token t of row b sees
    the positions from ks - cu_seqlens_kg[b] up to and without ke - cu_seqlens_kg[b].

    Lifetime. The arrays are views of the builder's buffers, which have the same addresses in every
    step, and are valid until its next `build`. After a build from device tensors the three lengths
    and `block_tables` are these tensors, valid until the caller changes them. Two objects are equal
    only if they are the same object.
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
    # int32 [T]: the same numbers; None unless the builder was made with `int32_position_ids`
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


class Field(NamedTuple):
    """Buffer of a field of `ForwardMeta`.

    Attributes:
        dtype: dtype of its values.
        is_by_row: True if its values belong to rows, else to tokens.
        width: number of values of each row or token.
        extra: number of values in front of them, 1 in prefix sums.
        is_window: True if only steps with prefill rows write it.
    """

    dtype: str = "int32"
    is_by_row: bool = False
    width: int = 1
    extra: int = 0
    is_window: bool = False


FIELDS = {
    "batch_id_per_token": Field(),
    "position_ids": Field("int64"),
    "position_ids_int32": Field(),
    "slot_mapping": Field("int64"),
    "cu_seqlens_q": Field(is_by_row=True, extra=1),
    "indexer_attn_mask_offsets": Field(width=2, is_window=True),
    "cu_seqlens_kg": Field(is_by_row=True, extra=1, is_window=True),
}
"""Buffers of the fields that a step computes."""
