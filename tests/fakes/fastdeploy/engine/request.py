"""Requests that the scheduler hands to the workers (`engine/request.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class RequestType(Enum):
    """Kind of a task."""

    PREFILL = 0
    DECODE = 1
    PREEMPTED = 2


@dataclass
class Request:
    """One task of one row.

    Attributes:
        idx: row of the batch.
        prompt_token_ids, output_token_ids: the whole request so far.
        prefill_start_index, prefill_end_index: tokens of a prefill task; cached ones are before.
        block_tables: all physical blocks that the row owns.
        max_tokens: tokens to generate, output_token_ids among them.
        disaggregate_decode: a prefill task on the decode node of a disaggregated pair: the prompt's
            keys are in the caches already.
    """

    idx: int
    task_type: RequestType
    prompt_token_ids: list[int] = field(default_factory=list)
    output_token_ids: list[int] = field(default_factory=list)
    prefill_start_index: int = 0
    prefill_end_index: int = 0
    block_tables: list[int] = field(default_factory=list)
    max_tokens: int = 1
    disaggregate_decode: bool = False
