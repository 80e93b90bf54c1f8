"""Slices of a builder's buffers that a step hands out, made once for each size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from fd_dsa.step.checks import StepCounts, StepInputs, StepLimits
from fd_dsa.step.forward_meta import Array, ForwardMeta

View = Callable[[Any], Array]
Allocate = Callable[[tuple[int, ...], str], Array]
# views are small; a server sees few row counts and, when decoding, few token counts
CACHED_VIEWS = 256

OUTPUTS = (
    "batch_id_per_token",
    "position_ids",
    "position_ids_int32",
    "slot_mapping",
    "cu_seqlens_q",
    "cache_seqlens",
)
"""Buffers that a kernel writes in every step."""
WINDOWS = ("indexer_attn_mask_offsets", "cu_seqlens_kg")
"""Buffers that it writes in steps with prefill rows only."""


class OutputBuffers:
    """What a step computes, at full capacity; shapes and types as in `ForwardMeta`.

    Args:
        limits: sizes that every step keeps to.
        allocate: makes a contiguous array of a shape and dtype.
        int32_position_ids: whether positions are written as int32 too.
    """

    def __init__(self, limits: StepLimits, allocate: Allocate, int32_position_ids: bool) -> None:
        rows, tokens = limits.max_num_seqs, limits.max_num_tokens
        self.cu_seqlens_q = allocate((rows + 1,), "int32")
        self.cache_seqlens = allocate((rows,), "int32")
        self.batch_id_per_token = allocate((tokens,), "int32")
        self.position_ids = allocate((tokens,), "int64")
        self.position_ids_int32 = allocate((tokens,), "int32") if int32_position_ids else None
        self.slot_mapping = allocate((tokens,), "int64")
        self.cu_seqlens_kg = allocate((rows + 1,), "int32")
        self.indexer_attn_mask_offsets = allocate((2 * tokens,), "int32")


class StepViews:
    """Makes the `ForwardMeta` of a step over buffers that never move.

    Args:
        buffers: arrays at full capacity, as attributes named like the fields.
        view: how a slice of a buffer becomes an array of the step, sharing its memory.
    """

    def __init__(self, buffers: Any, view: View) -> None:
        # a partial of a function, not of a method: the cache then keeps no builder alive
        size = CACHED_VIEWS * len(ForwardMeta.__slots__)
        self._first = lru_cache(maxsize=size)(partial(_first, buffers, view))

    def inputs(self, num_rows: int) -> list[Array]:
        """The buffers of the inputs, cut to the rows of a step."""
        return [self._first(name, num_rows) for name in StepInputs._fields]

    def forward_meta(self, inputs: Sequence[Array], counts: StepCounts) -> ForwardMeta:
        """The metadata of a step whose inputs, of exactly its rows, are these four arrays."""
        first, rows, tokens = self._first, int(inputs[2].shape[0]), counts.num_padded_tokens
        has_prefill = counts.num_prefill_tokens > 0
        return ForwardMeta(
            seq_lens_encoder=inputs[0],
            seq_lens_decoder=inputs[1],
            seq_lens_this_time=inputs[2],
            cu_seqlens_q=first("cu_seqlens_q", rows + 1),
            block_tables=inputs[3],
            batch_id_per_token=first("batch_id_per_token", tokens),
            position_ids=first("position_ids", tokens),
            position_ids_int32=first("position_ids_int32", tokens),
            slot_mapping=first("slot_mapping", tokens),
            cache_seqlens=first("cache_seqlens", rows),
            indexer_attn_mask_offsets=first(WINDOWS[0], 2 * tokens) if has_prefill else None,
            cu_seqlens_kg=first(WINDOWS[1], rows + 1) if has_prefill else None,
            num_prefill_tokens=counts.num_prefill_tokens,
            num_decode_tokens=counts.num_tokens - counts.num_prefill_tokens,
            max_seqlen_k=counts.max_seqlen_k,
        )


def _first(buffers: Any, view: View, name: str, size: int) -> Array | None:
    """The start of a buffer; None of one that there is not."""
    buffer = getattr(buffers, name)
    return None if buffer is None else view(buffer[:size])
