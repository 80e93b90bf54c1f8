"""Division of the indexer's rows among ranks.

Every rank holds all keys of the indexer, so any rank can score any token. In a long step with
prompts each rank scores and selects for one part of the tokens. Then the ranks gather the
selections, which are equal to the bit on all ranks.
"""

from __future__ import annotations

import logging

import numpy as np

from fd_dsa.attention.protocol import HostLengths, PromptLimits
from fd_dsa.distributed import Group
from fd_dsa.environment import divided_min_tokens
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Array

logger = logging.getLogger(__name__)
# tokens of a unit that is not cut, a multiple of the tokens of every tile of prompts
_UNIT = 16


class RowDivision:
    """Parts of a step's tokens, one for each rank, consecutive and in the order of ranks.

    All ranks must divide alike, so a division depends only on the lengths of a step.

    Args:
        group: ranks that share the model; None = one rank, which has all tokens.
        index_topk: keys that the indexer selects for a token.

    Attributes:
        is_active: True if long steps are divided.
        bounds: first token of each part, then the end of the last part; None = every rank has all
            tokens.
    """

    def __init__(self, group: Group | None, index_topk: int) -> None:
        self._group, self._index_topk = None, index_topk
        self._min_tokens = divided_min_tokens()
        self.is_active = False
        self.bounds: list[int] | None = None
        if group is None or not self._min_tokens:
            return
        if group.gathers_rows:
            self._group, self.is_active = group, True
            said = f"divided among ranks from {self._min_tokens} tokens of a step on"
        else:
            said = "on every rank, because the ranks cannot gather rows"
        logger.info("selection of prompts past %d tokens: %s", index_topk, said)

    def begin_step(self, step: ForwardMeta, lengths: HostLengths | PromptLimits | None) -> None:
        """Divide the tokens of a step, or give all tokens to every rank.

        Args:
            lengths: lengths of the step's rows. A step is not divided without them, or in a
                capture, which has only their limits.
        """
        self.bounds = None
        if step.num_prefill_tokens == 0:
            return
        if lengths is None or isinstance(lengths, PromptLimits):
            return
        if step.max_seqlen_k <= self._index_topk:
            return
        in_row, keys = scored_keys(lengths, self._index_topk)
        firsts = np.flatnonzero(in_row % _UNIT == 0)
        # the last part has the padding, too
        starts = np.append(firsts, step.position_ids.shape[0])
        self.divide(starts, np.add.reduceat(keys, firsts), int(np.count_nonzero(keys)))

    def divide(self, starts: np.ndarray, costs: np.ndarray, num_scored: int) -> None:
        """Divide units of consecutive tokens into parts of about equal cost.

        Args:
            starts: first token of each unit, then the end of the last one, int [num_units + 1].
            costs: number of scores of each unit, int [num_units].
            num_scored: number of tokens with scores.
        """
        self.bounds = None
        if self._group is not None and num_scored >= self._min_tokens:
            self.bounds = starts[equal_parts(costs, self._group.size)].tolist()

    def part(self, num_tokens: int) -> tuple[int, int]:
        """Return the first token of this rank's part and its end, in a step of `num_tokens`."""
        if self.bounds is None or self._group is None:
            return 0, num_tokens
        rank = self._group.rank
        return self.bounds[rank], self.bounds[rank + 1]

    def gather(self, slots: Array) -> None:
        """Fill the rows of `slots` [num_tokens, topk] that other ranks have selected."""
        if self.bounds is not None and self._group is not None:
            self._group.all_gather_rows(slots, self.bounds)


def scored_keys(lengths: HostLengths, index_topk: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of each token in its row, and its scores, 0 with at most `index_topk` keys.

    Args:
        lengths: lengths of the rows of a step, see HostLengths.
    """
    _, computed, scheduled = lengths
    rows = np.repeat(np.arange(len(scheduled)), scheduled)
    in_row = np.arange(len(rows)) - (np.cumsum(scheduled) - scheduled)[rows]
    keys = computed[rows] + in_row + 1
    return in_row, np.where(keys > index_topk, keys, 0)


def equal_parts(costs: np.ndarray, size: int) -> np.ndarray:
    """Cut a list of costs into `size` parts, whose sums are as equal as single cuts allow.

    Returns:
        First index of each part, then the number of costs, int [size + 1].
    """
    ends = np.cumsum(costs, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    wanted = total * np.arange(1, size) / size
    # a cost belongs to the part that has its middle
    cuts = np.searchsorted(ends - costs / 2, wanted)
    return np.array([0, *cuts, len(ends)])
