"""Buffers of the fields of `ForwardMeta`, and the slices of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from fd_dsa.device.allocation import CACHED_VIEWS
from fd_dsa.step.checks import Counts, StepLimits
from fd_dsa.step.forward_meta import ForwardMeta
from fd_dsa.tensor import StepArray

View = Callable[[Any], StepArray]


class Field(NamedTuple):
    """Buffer of a field of `ForwardMeta`.

    Attributes:
        dtype: of its values.
        of_rows: it has values of rows; else of tokens.
        values: of each row or token.
        more: one value in front of them all, of a prefix sum.
        is_window: written in steps with prefill rows only.
    """

    dtype: str = "int32"
    of_rows: bool = False
    values: int = 1
    more: int = 0
    is_window: bool = False


FIELDS = {
    "batch_id_per_token": Field(),
    "position_ids": Field("int64"),
    "position_ids_int32": Field(),
    "slot_mapping": Field("int64"),
    "cu_seqlens_q": Field(of_rows=True, more=1),
    "indexer_attn_mask_offsets": Field(values=2, is_window=True),
    "cu_seqlens_kg": Field(of_rows=True, more=1, is_window=True),
}


def new_buffers(
    limits: StepLimits,
    allocate: Callable[[tuple[int, ...], str], StepArray],
    int32_position_ids: bool,
) -> dict[str, StepArray | None]:
    """Allocate the arrays of all fields at full capacity, with None for unused int32 positions.

    Args:
        limits: sizes that every step keeps to.
        allocate: makes a contiguous array of a shape and dtype.
        int32_position_ids: whether positions are written as int32 too.
    """
    buffers: dict[str, StepArray | None] = {"position_ids_int32": None}
    for name, field in FIELDS.items():
        size = limits.max_num_seqs if field.of_rows else limits.max_num_tokens
        if name not in buffers or int32_position_ids:
            buffers[name] = allocate((field.values * size + field.more,), field.dtype)
    return buffers


class StepViews:
    """Makes the `ForwardMeta` of a step over buffers that never move.

    Args:
        view: how a slice of a buffer becomes an array of the step, sharing its memory.
    """

    def __init__(self, buffers: dict[str, StepArray | None], view: View) -> None:
        # a partial of a function, not of a method: the cache then keeps no builder alive
        self._cut = lru_cache(maxsize=CACHED_VIEWS)(partial(_cut, buffers, view))

    def forward_meta(self, inputs: Sequence[StepArray], counts: Counts) -> ForwardMeta:
        """Return the metadata of a step, from four inputs of exactly its rows."""
        num_tokens, num_prefill_tokens, max_seqlen_k, padded = counts
        encoder, decoder, this_time, tables = inputs
        has_prefill, num_rows = num_prefill_tokens > 0, int(this_time.shape[0])
        cu_q, cu_kg = self._cut(True, num_rows, has_prefill)
        batch_ids, positions, int32_positions, slots, windows = self._cut(
            False, padded, has_prefill
        )
        # by position: names would double the time of this call, which each step waits for
        return ForwardMeta(
            *(encoder, decoder, this_time, cu_q, tables, batch_ids, positions, int32_positions),
            *(slots, windows, cu_kg),
            *(num_prefill_tokens, num_tokens - num_prefill_tokens, max_seqlen_k),
        )


def _cut(
    buffers: dict[str, StepArray | None], view: View, of_rows: bool, size: int, has_prefill: bool
) -> list[StepArray | None]:
    """Cut the fields of rows or of tokens to the size of a step, with None for absent fields."""
    views: list[StepArray | None] = []
    for name, field in FIELDS.items():
        if field.of_rows == of_rows:
            buffer, end = buffers[name], field.values * size + field.more
            if buffer is None or (field.is_window and not has_prefill):
                views.append(None)
            else:
                views.append(view(buffer[:end]))
    return views
