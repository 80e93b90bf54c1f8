"""Rows of the steps that run before the first request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fd_dsa.runner.input_batch import InputBatch


class TrialRow(NamedTuple):
    """Row of a step that no request has.

    Attributes:
        num_tokens: tokens of the row in the step.
        num_cached: tokens before them.
        is_prompt: True for a prefill row.
    """

    num_tokens: int
    num_cached: int
    is_prompt: bool


def fill_rows(batch: InputBatch, rows: Sequence[TrialRow], is_pending: bool = False) -> int:
    """Fill a batch with rows that share the same blocks.

    Args:
        is_pending: True if all tokens are the first sample of the step before.

    Returns:
        Flat index of the last token.
    """
    batch.begin_step()
    for number, row in enumerate(rows):
        num_blocks = -(-(row.num_tokens + row.num_cached) // batch.block_size)
        batch.set_blocks(number, range(num_blocks))
    new, cached, are_prompts = zip(*rows, strict=True)
    ids = [0] * sum(new)
    pending = dict.fromkeys(range(len(ids)), 0) if is_pending else {}
    batch.add_rows(range(len(rows)), new, ids, cached, are_prompts, pending)
    return batch.num_tokens - 1


def clear_rows(batch: InputBatch) -> None:
    """Remove all rows and blocks from a batch."""
    batch.begin_step()
    for row in range(batch.max_num_seqs):
        batch.clear_row(row)
