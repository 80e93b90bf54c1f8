"""Speculative decoding: the drafts that a step verifies, and their acceptance.

A token is a function of its logits, the seed of its request and its position in the output. A draft
is accepted if it equals the token that is sampled at its position without drafts. So the tokens of
an output do not depend on drafts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from fd_dsa.engine.batch import Drafts, ScheduledBatch
from fd_dsa.engine.draft_state import DraftCosts, DraftState
from fd_dsa.engine.metrics import EngineStats
from fd_dsa.engine.request import Request
from fd_dsa.errors import RankError

logger = logging.getLogger(__name__)


class Drafter(Protocol):
    """Source of drafts.

    Attributes:
        is_layer: True for a layer of the model. Its KV cache has entries only for tokens that it
            has processed, and an entry depends on the token after its own. The layer needs no
            tokens on the host.
        prior_acceptance_rate: acceptance rate that is assumed before any draft was verified.
    """

    is_layer: bool
    prior_acceptance_rate: float

    def propose(
        self, batch: ScheduledBatch, counts: Mapping[Request, int]
    ) -> dict[Request, Drafts]:
        """Return tokens that may follow those of some requests.

        Args:
            batch: step that has just given its requests their tokens, or is in flight.
            counts: maximum number of drafts of each request that wants some.
        """


class ArbitraryDrafter:
    """Drafter that proposes arbitrary tokens at no cost, to time decode steps."""

    is_layer, prior_acceptance_rate = False, 0.6

    def propose(
        self, batch: ScheduledBatch, counts: Mapping[Request, int]
    ) -> dict[Request, Drafts]:
        """Return the token 0 as each draft."""
        return {request: Drafts([0] * count) for request, count in counts.items()}


class SpecDecoder:
    """Decides on drafts after each step, which the next step verifies.

    Args:
        drafter: proposes the drafts.
        max_drafts: maximum number of drafts of a request in a step.
        costs: times of decode steps; None if drafts cost no time.

    Attributes:
        drafter, max_drafts, costs: as given.
        new_requests: requests that have arrived since the last call of `admit`.
        needs_sync: True if drafts come from the tokens of the next step, so that no later step is
            enqueued before the host has them.
    """

    def __init__(self, drafter: Drafter, max_drafts: int, costs: DraftCosts | None = None) -> None:
        self.drafter, self.max_drafts = drafter, max_drafts
        self.costs = costs or DraftCosts({1: [1.0] * (max_drafts + 1)})
        self.new_requests: list[Request] = []
        self._is_off = self.needs_sync = False

    def admit(self, num_rows: int) -> None:
        """Enable drafting for new requests, unless it is disallowed or not worth its cost.

        Requests that arrive together are costed with the same batch size.

        Args:
            num_rows: number of rows of the steps that the requests will be in.
        """
        times = self.costs.of(num_rows, num_rows) if self.new_requests else []
        for request in self.new_requests:
            request.drafts = DraftState(self.max_drafts, self.drafter.prior_acceptance_rate)
            params, best = request.params, request.drafts.length(times)
            pays = best > 0 or not self.drafter.is_layer
            if not (pays and params.speculative) or params.return_topk_positions:
                self._disable_drafts(request)
        self.new_requests.clear()

    def _disable_drafts(self, request: Request) -> None:
        """Disable drafting for a request until its end.

        Steps without drafts skip the layer, so later blocks of the request get other keys.
        """
        request.drafts = None
        if self.drafter.is_layer:
            request.block_keys.leave_drafts()

    def record_acceptance(self, batch: ScheduledBatch, stats: EngineStats) -> None:
        """Record the number of accepted drafts of each request.

        Args:
            batch: step with drafts, whose tokens have been processed.
            stats: counts the drafts.
        """
        for request, drafts in batch.drafts.items():
            if (num_accepted := batch.num_accepted.get(request)) is None:
                continue
            # drafting may have been disabled while these drafts were in flight
            if request.drafts is not None:
                request.drafts.record(len(drafts), num_accepted)
            stats.count_drafts(len(drafts), num_accepted)
            request.state.num_draft_tokens += len(drafts)
            request.state.num_accepted_tokens += num_accepted

    def propose(self, batch: ScheduledBatch) -> dict[Request, Drafts]:
        """Return drafts for the next step, in the numbers that pay by the rates seen so far."""
        # also for ended requests, because others may share the blocks that the step filled
        runs = not self._is_off and any(request.drafts is not None for request in batch.requests)
        counts = self._counts(batch)
        try:
            proposals = self.drafter.propose(batch, counts) if runs else {}
        except RankError:
            # the engine cannot continue without all ranks
            raise
        except Exception:
            # the step's tokens are valid, so a failed drafter must not fail it
            logger.exception("speculative decoding is off from now on: the drafter failed")
            self._is_off, proposals = True, {}
        if not self.drafter.is_layer:
            self.needs_sync = any(proposals.values())
            # these drafts would be placed ahead of tokens that are in flight
            proposals = {} if batch.is_in_flight else proposals
        for request, drafts in proposals.items():
            if drafts and not drafts.is_pending and request.grammar is not None:
                proposals[request] = drafts.first(request.grammar.count_allowed(drafts.tokens))
        return proposals

    def _counts(self, batch: ScheduledBatch) -> dict[Request, int]:
        """Return the number of drafts of each request for which drafts pay."""
        states = {
            request: request.drafts
            for request in batch.sampling
            if request.finish_reason is None
            and request.drafts is not None
            and request not in batch.late
        }
        for request in batch.late:
            # masks after its drafts would be late too
            if request.drafts is not None:
                self._disable_drafts(request)
        if not states:
            return {}
        num_rows, counts = len(batch.sampling), dict[Request, int]()
        times, share = self.costs.of(num_rows, len(states)), num_rows / len(states)
        for request, state in states.items():
            if count := state.length(times, share):
                counts[request] = count
            elif self.drafter.is_layer:
                self._disable_drafts(request)
        return counts
