"""Drafts without weights: tokens that followed the newest ones earlier in the text."""

from __future__ import annotations

from array import array
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
        self._widths = tuple(range(4 * longest, 4 * shortest - 1, -4))
        # tokens as bytes of int32, because a garbage collection visits every tuple
        self._ends: dict[bytes, int] = {}
        # the last run of the maximum length, with tokens -1 before the first one
        self._newest = b"\xff" * 4 * longest
        self._num_listed = 0

    def following(self, count: int) -> list[int]:
        """Return up to `count` tokens after the longest earlier run of the newest tokens."""
        tokens, ends, widths, begin = self._token_ids, self._ends, self._widths, self._num_listed
        new = tokens[begin : begin + _MAX_LISTED]
        packed = self._newest + array("i", new).tobytes()
        # the run at the end of the list is the one to look up, so it is not listed yet
        for width in widths:
            at = widths[0]
            for stop in range(begin, begin + len(new)):
                ends[packed[at - width : at]] = stop
                at += 4
        self._newest = newest = packed[-widths[0] :]
        self._num_listed = begin + len(new)
        if self._num_listed < len(tokens):
            return []
        for width in widths:
            if (found := ends.get(newest[-width:])) is not None:
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
