"""Drafts without weights: what followed the last tokens where they came before."""

from __future__ import annotations

from collections.abc import Mapping

from fd_dsa.engine.batch import ScheduledBatch
from fd_dsa.engine.draft_state import Drafts
from fd_dsa.engine.request import Request
from fd_dsa.engine.speculation import Drafter

# tokens that are listed in a step, so that a long prompt holds up nobody: some 10 ms
_MOST_LISTED = 8192


class LookupIndex:
    """Where each run of a few tokens of a growing list came last.

    Args:
        token_ids: the list.
        longest, shortest: tokens of a run.

    Cost: for each token one entry of some 100 bytes for each length of a run.
    """

    def __init__(self, token_ids: list[int], longest: int, shortest: int) -> None:
        self._token_ids = token_ids
        self._ends: dict[int, dict[tuple[int, ...], int]] = {
            length: {} for length in range(longest, shortest - 1, -1)
        }
        self._num_listed = 0

    def following(self, count: int) -> list[int]:
        """At most `count` tokens that followed the last ones, the longest run that came before."""
        tokens = self._token_ids
        # the run that ends the list is looked for, so it is not listed yet
        end = min(len(tokens) - 1, self._num_listed + _MOST_LISTED)
        for length, ends in self._ends.items():
            for stop in range(max(self._num_listed + 1, length), end + 1):
                ends[tuple(tokens[stop - length : stop])] = stop
        self._num_listed = end
        if end < len(tokens) - 1:
            return []
        for length, ends in self._ends.items():
            # none where there are fewer tokens
            if (found := ends.get(tuple(tokens[-length:]))) is not None:
                return tokens[found : found + count]
        return []


class PromptLookup(Drafter):
    """Drafter of the method "ngram".

    Args:
        longest, shortest: tokens that have to come before.

    Source: prompt lookup decoding (Saxena 2023), as vLLM's "ngram".
    """

    def __init__(self, longest: int, shortest: int) -> None:
        self._longest, self._shortest = longest, shortest

    def propose(
        self, batch: ScheduledBatch, counts: Mapping[Request, int]
    ) -> dict[Request, Drafts]:
        """Drafts of requests that have got a token, at most so many each."""
        proposals = {}
        for request, count in counts.items():
            # where none pays, what has come since is listed later
            if (state := request.drafts) is not None:
                own = state.memory or LookupIndex(request.token_ids, self._longest, self._shortest)
                state.memory, proposals[request] = own, Drafts(own.following(count))
        return proposals
