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
        # partials of functions, not of methods: the caches then keep no builder alive
        cached = lru_cache(maxsize=CACHED_VIEWS)
        self._inputs = cached(partial(_first, buffers, view, StepInputs._fields))
        self._of_rows = cached(partial(_of_rows, buffers, view))
        self._of_tokens = cached(partial(_of_tokens, buffers, view))

    def inputs(self, num_rows: int) -> list[Array]:
        """The buffers of the inputs, cut to the rows of a step."""
        return list(self._inputs(num_rows).values())

    def forward_meta(self, inputs: Sequence[Array], counts: StepCounts) -> ForwardMeta:
        """The metadata of a step whose inputs, of exactly its rows, are these four arrays."""
        rows, has_prefill = int(inputs[2].shape[0]), counts.num_prefill_tokens > 0
        return ForwardMeta(
            seq_lens_encoder=inputs[0],
            seq_lens_decoder=inputs[1],
            seq_lens_this_time=inputs[2],
            block_tables=inputs[3],
            **self._of_rows(rows, has_prefill),
            **self._of_tokens(counts.num_padded_tokens, has_prefill),
            num_prefill_tokens=counts.num_prefill_tokens,
            num_decode_tokens=counts.num_tokens - counts.num_prefill_tokens,
            max_seqlen_k=counts.max_seqlen_k,
        )


def _first(buffers: Any, view: View, names: Sequence[str], size: int) -> dict[str, Any]:
    """The start of some buffers; None of one that there is not."""
    whole = {name: getattr(buffers, name) for name in names}
    return {n: None if buffer is None else view(buffer[:size]) for n, buffer in whole.items()}


def _of_rows(buffers: Any, view: View, num_rows: int, has_prefill: bool) -> dict[str, Any]:
    """Fields of a step with a value for each row."""
    cut = partial(_first, buffers, view)
    windows = cut((WINDOWS[1],), num_rows + 1) if has_prefill else {WINDOWS[1]: None}
    return cut(("cache_seqlens",), num_rows) | cut(("cu_seqlens_q",), num_rows + 1) | windows


def _of_tokens(buffers: Any, view: View, num_tokens: int, has_prefill: bool) -> dict[str, Any]:
    """Fields of a step with a value for each token."""
    cut = partial(_first, buffers, view)
    windows = cut((WINDOWS[0],), 2 * num_tokens) if has_prefill else {WINDOWS[0]: None}
    return cut(OUTPUTS[:4], num_tokens) | windows
