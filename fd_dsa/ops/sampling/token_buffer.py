"""Tokens that a step samples on a device, and how later steps name them before the host has them.

A pending token is one that a device has sampled or will sample before the step that reads it. The
host names it by its index in the token buffer. Ids of tokens are never negative, so a copy to the
device carries either the id or the index in one int32 value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NOT_FINITE = -1
"""Result of a row whose logits hold NaN or +inf, or only -inf."""
NO_TOKEN = -2
"""Result of a row whose rules allow no token."""
REJECTED = -3
"""Result of a row after a rejected draft."""

# kernels have one form for all views that begin at multiples of 16 bytes
_ALIGNED = 32


@dataclass(frozen=True, slots=True)
class TokenBuffer:
    """Layout of the token buffer: samples and drafts of one step, int64.

        section        index              without drafts
        newest token   row of a request   the same section as the samples
        samples        sample + row       0 + row
        drafts         draft(depth, row)  none

    Args:
        max_num_seqs: requests of a step.
        max_drafts: drafts of a request in a step.
    """

    max_num_seqs: int
    max_drafts: int

    @property
    def stride(self) -> int:
        """Number of tokens from one section of requests to the next one."""
        return _aligned(self.max_num_seqs)

    @property
    def num_rows(self) -> int:
        """Number of rows of logits: one for each request and for each of its drafts."""
        return (1 + self.max_drafts) * self.max_num_seqs

    @property
    def sample(self) -> int:
        """Index of the first sample."""
        return self.stride if self.max_drafts else 0

    def draft(self, depth: int, row: int) -> int:
        """Return the index of a draft that comes after `depth` others of its request."""
        return self.sample + _aligned(self.num_rows) + depth * self.stride + row

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.draft(self.max_drafts, 0)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def staged_ids(
    token_ids: npt.NDArray[np.int64], pending: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Return the values from which `follow_kernel` makes the token ids of a step.

    Args:
        token_ids: int64 [n]; ids of tokens that the host knows.
        pending: int32 [n]; index of each pending token in the buffer, -1 = the host knows it.

    Returns:
        int64 [n]; the id, or -1 - index of a pending token.
    """
    return np.where(pending < 0, token_ids, -1 - pending.astype(np.int64))
