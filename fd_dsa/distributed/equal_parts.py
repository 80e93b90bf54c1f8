"""Division of a step's tokens among ranks into equal parts."""

from __future__ import annotations

import logging
from typing import Any

from fd_dsa.distributed.group import Group, summed
from fd_dsa.environment import DIVIDED_VARIABLE, divided_min_tokens
from fd_dsa.ops.fixed_order import row_dependence_refusal
from fd_dsa.tensor import Tensor

logger = logging.getLogger(__name__)
LEAST_TOKENS = 512
"""Minimum tokens of a part, unless FD_DSA_DIVIDED_MIN_TOKENS has that of a step.

With few tokens the further launches of a divided step cost more than the division saves. The limit
is an estimate: on two GPUs benchmarks/divided_rows.py found eager steps of 1,024 tokens slower and
of 8,192 tokens faster, and compared no captured step.
"""
# tokens of a unit that is not cut, a multiple of the tokens of every tile of prompts
_UNIT = 16


class EqualParts:
    """Equal parts of a step's tokens, one for each rank, consecutive and in the order of ranks.

    A part is for work that every rank would do alike for all tokens. All ranks must divide alike,
    so the division depends only on the number of tokens. The sums of a divided step may have
    another order, so no step is divided under FD_DSA_BATCH_INVARIANT.

    Args:
        group: ranks that share the model; None = one rank, which has all tokens.
        num_tokens: tokens of the step, with padding.

    Attributes:
        own: range of this rank's tokens, begin and end.
    """

    def __init__(self, group: Group | None, num_tokens: int) -> None:
        self._group, self._divided = group, None
        self.own = 0, num_tokens
        count = _part_of_long_step(group, num_tokens)
        if group is not None and num_tokens == group.size * count > 0:
            self._divided = group
            self.own = group.rank * count, (group.rank + 1) * count

    @staticmethod
    def padded(group: Group | None, num_tokens: int) -> int:
        """Return the tokens, with padding, of a long step that the ranks then divide.

        Returns:
            `num_tokens` if padding does not make the step one that they divide.
        """
        count = _part_of_long_step(group, num_tokens)
        return num_tokens if group is None or count == 0 else group.size * count

    @staticmethod
    def announce(group: Group | None) -> None:
        """Log which steps the ranks divide, or why they divide none."""
        if group is not None:
            steps = f"divided among ranks from {_min_tokens(group)} tokens on"
            reason = _refusal(group)
            logger.info(
                "residual streams and selection of long steps: %s",
                f"on every rank ({reason})" if reason else steps,
            )

    def take(self, rows: Tensor) -> Tensor:
        """Return the rows of this rank's tokens."""
        return rows if self._divided is None else rows[slice(*self.own)]

    def summed(self, part: Tensor) -> Tensor:
        """Return the rows of this rank's tokens in the sum over all ranks.

        Args:
            part: part of the sum, [num_tokens, ...]; may be overwritten.
        """
        if self._divided is not None:
            return self._divided.reduce_scatter(part)
        return summed(part, self._group)

    def gathered(self, rows: Tensor) -> Tensor:
        """Return the rows of all tokens.

        Args:
            rows: contiguous rows of this rank's tokens.
        """
        if self._divided is None:
            return rows
        parts: Any = self._divided.all_gather(rows)
        whole: Tensor = parts.reshape([-1, *rows.shape[1:]])
        return whole


def _part_of_long_step(group: Group | None, num_tokens: int) -> int:
    """Return the tokens of a rank in a step with padding, 0 if the step is not divided."""
    if group is None or _refusal(group) or num_tokens < _min_tokens(group):
        return 0
    return -(-num_tokens // (group.size * _UNIT)) * _UNIT


def _min_tokens(group: Group) -> int:
    """Return the minimum tokens of a step that the ranks divide, 0 if they divide none."""
    return divided_min_tokens(group.size * LEAST_TOKENS)


def _refusal(group: Group) -> str:
    """Return why the ranks of a group divide no step, else ""."""
    if not group.gathers_rows:
        return "the ranks cannot gather rows"
    return row_dependence_refusal() or ("" if _min_tokens(group) else f"{DIVIDED_VARIABLE} is 0")
