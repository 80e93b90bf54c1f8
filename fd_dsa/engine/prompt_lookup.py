"""Drafts without weights: tokens that followed the newest ones earlier in the text."""

from __future__ import annotations

from collections.abc import Mapping

from fd_dsa.engine.batch import Drafts, ScheduledBatch
from fd_dsa.engine.request import Request

# maximum number of tokens listed in a step, about 10 ms, so that a long prompt delays no request
_MAX_LISTED = 8192


class LookupIndex:
    """Index of the last position of each short run of tokens in a growing list.

    Args:
        token_ids: the list.
        longest, shortest: maximum and minimum number of tokens of a run.

    Cost: about 100 bytes for each token and length of a run.
    """

    def __init__(self, token_ids: list[int], longest: int, shortest: int) -> None:
        self._token_ids = token_ids
        self._ends: dict[int, dict[tuple[int, ...], int]] = {
            length: {} for length in range(longest, shortest - 1, -1)
        }
        self._num_listed = 0

    def following(self, count: int) -> list[int]:
        """Return up to `count` tokens after the longest earlier run of the newest tokens."""
        tokens = self._token_ids
        # the run at the end of the list is the one to look up, so it is not listed yet
        end = min(len(tokens) - 1, self._num_listed + _MAX_LISTED)
        for length, ends in self._ends.items():
            for stop in range(max(self._num_listed + 1, length), end + 1):
                ends[tuple(tokens[stop - length : stop])] = stop
        self._num_listed = end
        if end < len(tokens) - 1:
            return []
        for length, ends in self._ends.items():
            # a list with fewer tokens has no such run
            if (found := ends.get(tuple(tokens[-length:]))) is not None:
                return tokens[found : found + count]
        return []


class PromptLookup:
    """Drafter of the method "ngram".

    Args:
        longest, shortest: see LookupIndex.

    Source: prompt lookup decoding (Saxena 2023), as vLLM's "ngram".
    """

    is_layer, prior_acceptance_rate = False, 0.6

    def __init__(self, longest: int, shortest: int) -> None:
        self._longest, self._shortest = longest, shortest

    def propose(
        self, batch: ScheduledBatch, counts: Mapping[Request, int]
    ) -> dict[Request, Drafts]:
        """Return drafts of requests that have got a token, as `Drafter.propose` does."""
        proposals = {}
        for request, count in counts.items():
            # requests whose drafts do not pay list their new tokens later
            if (state := request.drafts) is not None:
                own = state.memory or LookupIndex(request.token_ids, self._longest, self._shortest)
                state.memory, proposals[request] = own, Drafts(own.following(count))
        return proposals
