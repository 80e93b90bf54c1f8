"""Tokens that a step samples on a device, and how later steps name them before the host has them.

A pending token is one that a device has sampled or will sample before the step that reads it. The
host names it by its index in the token buffer.
"""

from __future__ import annotations

NOT_FINITE = -1
"""Result of a row whose logits hold NaN or +inf, or only -inf."""
NO_TOKEN = -2
"""Result of a row whose rules allow no token."""
REJECTED = -3
"""Result of a row after a rejected draft."""

# tokens; sections begin at multiples, so that one form of a kernel serves all of them
_ALIGNED = 32


class TokenBuffer:
    """Layout of the token buffer: samples and drafts of one step, int64.

    The section of the newest tokens has index `row` for each request. The samples have index
    `sample + row`, and the drafts `draft(depth, row)`. Without drafts the buffer has only samples.

    Args:
        max_num_seqs: requests of a step.
        max_drafts: drafts of a request in a step.

    Attributes:
        max_num_seqs, max_drafts: as given.
        stride: number of tokens from one section of requests to the next one.
        num_rows: number of rows of logits, one for each request and for each of its drafts.
        sample: index of the first sample.
        size: number of tokens.
    """

    def __init__(self, max_num_seqs: int, max_drafts: int) -> None:
        self.max_num_seqs, self.max_drafts = max_num_seqs, max_drafts
        self.stride = _aligned(max_num_seqs)
        self.num_rows = (1 + max_drafts) * max_num_seqs
        self.sample = self.stride if max_drafts else 0
        self._first_draft = self.sample + _aligned(self.num_rows)
        self.size = self.draft(max_drafts, 0)

    def draft(self, depth: int, row: int) -> int:
        """Return the index of a draft that comes after `depth` others of its request."""
        return self._first_draft + depth * self.stride + row


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
