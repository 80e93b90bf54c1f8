"""Slices of a provider's buffers that a step hands out, made once for each size."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Protocol

from fd_dsa.step.counts import StepCounts
from fd_dsa.step.forward_meta import Array, ForwardMeta

View = Callable[[Any], Array]
# views are small; a server sees few row counts and, when decoding, few token counts
_CACHED_VIEWS = 256


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


class OutputBuffers(Protocol):
    """What a step computes, at full capacity; shapes and types as in `ForwardMeta`."""

    cu_seqlens_q: Any
    cache_seqlens: Any
    batch_id_per_token: Any
    position_ids: Any
    # None where the builder was not asked for it
    position_ids_int32: Any
    slot_mapping: Any
    cu_seqlens_kg: Any
    indexer_attn_mask_offsets: Any


class InputBuffers(Protocol):
    """Copies of a step's inputs, at full capacity."""

    seq_lens_encoder: Any
    seq_lens_decoder: Any
    seq_lens_this_time: Any
    block_tables: Any


class StepViews:
    """Makes the `ForwardMeta` of a step over buffers that never move.

    Args:
        buffers: the arrays at full capacity.
        view: how a slice of a buffer becomes an array of the step, sharing its memory.
    """

    def __init__(self, buffers: OutputBuffers, view: View) -> None:
        # partials of functions, not of methods: the caches then keep no provider alive
        cached = lru_cache(maxsize=_CACHED_VIEWS)
        self._rows = cached(partial(_row_views, buffers, view))
        self._tokens = cached(partial(_token_views, buffers, view))
        self._windows = cached(partial(_window_views, buffers, view))

    def forward_meta(self, inputs: tuple[Array, ...], counts: StepCounts) -> ForwardMeta:
        """The metadata of a step whose inputs, of exactly its rows, are these four arrays."""
        encoder, decoder, this_time, tables = inputs
        num_rows = int(this_time.shape[0])
        cu_q, cache_lens = self._rows(num_rows)
        batch_ids, positions, positions_int32, slots = self._tokens(counts.num_padded_tokens)
        offsets, cu_kg = (
            self._windows(num_rows, counts.num_padded_tokens)
            if counts.num_prefill_tokens
            else (None, None)
        )
        return ForwardMeta(
            seq_lens_encoder=encoder,
            seq_lens_decoder=decoder,
            seq_lens_this_time=this_time,
            cu_seqlens_q=cu_q,
            block_tables=tables,
            batch_id_per_token=batch_ids,
            position_ids=positions,
            position_ids_int32=positions_int32,
            slot_mapping=slots,
            cache_seqlens=cache_lens,
            indexer_attn_mask_offsets=offsets,
            cu_seqlens_kg=cu_kg,
            num_prefill_tokens=counts.num_prefill_tokens,
            num_decode_tokens=counts.num_tokens - counts.num_prefill_tokens,
            max_seqlen_k=counts.max_seqlen_k,
        )


def input_views(buffers: InputBuffers, view: View) -> Callable[[int], tuple[Array, ...]]:
    """The four inputs of a step as a function of its rows; each row count is sliced once."""
    return lru_cache(maxsize=_CACHED_VIEWS)(partial(_input_views, buffers, view))


def _input_views(buffers: InputBuffers, view: View, num_rows: int) -> tuple[Array, ...]:
    """The inputs of the first rows."""
    return (
        view(buffers.seq_lens_encoder[:num_rows]),
        view(buffers.seq_lens_decoder[:num_rows]),
        view(buffers.seq_lens_this_time[:num_rows]),
        view(buffers.block_tables[:num_rows]),
    )


def _row_views(buffers: OutputBuffers, view: View, num_rows: int) -> tuple[Array, Array]:
    """What a step computes for each row."""
    return view(buffers.cu_seqlens_q[: num_rows + 1]), view(buffers.cache_seqlens[:num_rows])


def _token_views(buffers: OutputBuffers, view: View, num_tokens: int) -> tuple[Array, ...]:
    """What a step computes for each token."""
    return (
        view(buffers.batch_id_per_token[:num_tokens]),
        view(buffers.position_ids[:num_tokens]),
        None
        if buffers.position_ids_int32 is None
        else view(buffers.position_ids_int32[:num_tokens]),
        view(buffers.slot_mapping[:num_tokens]),
    )


def _window_views(
    buffers: OutputBuffers, view: View, num_rows: int, num_tokens: int
) -> tuple[Array, Array]:
    """What only a step with a prefill token has."""
    return (
        view(buffers.indexer_attn_mask_offsets[: 2 * num_tokens]),
        view(buffers.cu_seqlens_kg[: num_rows + 1]),
    )
