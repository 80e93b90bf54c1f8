"""Speculative decoding: which drafts a step verifies, and which of them stand.

A draw is a function of a request's seed and the position in its output. So a draft stands where it
is the token that is drawn there without drafts, and no token of an output depends on drafts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.draft_state import NO_DRAFTS, Drafts, DraftState
from fd_dsa.engine.launched_step import LaunchedStep
from fd_dsa.engine.metrics import EngineStats
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.request import Request
from fd_dsa.engine.scheduler import Scheduler
from fd_dsa.engine.step_costs import StepCosts
from fd_dsa.ops.sampling.token_buffer import REJECTED

logger = logging.getLogger(__name__)


class Drafter:
    """Proposes tokens; this one any, which take no time, for steps that are measured.

    Attributes:
        is_layer: whether it is a layer of the model, with caches that lack what it has not run for,
            and whose entries depend on the token after their own. It needs no tokens on the host.
        usual_rate: at which its drafts stand mostly.
    """

    is_layer, usual_rate = False, 0.6

    def propose(self, step: LaunchedStep, counts: Mapping[Request, int]) -> dict[Request, Drafts]:
        """Tokens that may follow those of some requests.

        Args:
            step: the one that has just given its requests their tokens, or will give them.
            counts: most drafts of each request that wants some.
        """
        return {request: Drafts([0] * count) for request, count in counts.items()}


class Speculator:
    """Has drafts made after each step, and verifies them in the next one.

    Args:
        drafter: makes them.
        most: drafts of a request in a step.
        costs: of steps; None: drafts cost nothing.

    Attributes:
        drafter, most, costs: as given.
        arrived: requests that have computed nothing, before `begin`.
        waits: whether drafts come of the tokens of the next step, so that none is queued before.
    """

    def __init__(self, drafter: Drafter, most: int, costs: StepCosts | None = None) -> None:
        self.drafter, self.most = drafter, most
        self.costs = costs or StepCosts({1: [1.0] * (most + 1)})
        self.arrived: list[Request] = []
        self._is_off = self.waits = False

    def begin(self, num_rows: int) -> None:
        """Let those that have arrived have drafts, unless they must not or none would pay.

        All that have come since the step before count the same rows.

        Args:
            num_rows: of the steps that they will be in.
        """
        times = self.costs.of(num_rows, num_rows) if self.arrived else []
        for request in self.arrived:
            request.drafts = DraftState(self.most, self.drafter.usual_rate)
            params, best = request.params, request.drafts.length(times)
            pays = best > 0 or not self.drafter.is_layer
            if not (pays and params.speculative) or params.return_topk_positions:
                self._leave(request)
        self.arrived.clear()

    def _leave(self, request: Request) -> None:
        """Give a request no drafts from now on.

        The layer is left out of steps without drafts, so its blocks from now on have other keys.
        """
        request.drafts = None
        if self.drafter.is_layer:
            request.block_keys.leave_drafts()

    def verify(
        self,
        step: LaunchedStep,
        append: Callable[[LaunchedStep, list[Request], Any, Any], list[RequestOutput]],
        scheduler: Scheduler,
        stats: EngineStats,
        tokens: npt.NDArray[np.int64] | None,
    ) -> list[RequestOutput]:
        """Give the requests of a step their tokens: one, and one for each draft that stands.

        Those that ended while it was in flight get none.

        Args:
            step: with drafts.
            append: gives each of some requests a token: the one drawn, or sampled from logits.
            scheduler: learns of tokens that are computed.
            stats: counts them.
            tokens: of all rows, REJECTED after a wrong draft, where a device has drawn them.

        Returns:
            Outputs of requests for which there is no token.
        """
        first, outputs = dict(zip(step.sampling, step.first_rows, strict=False)), []
        for request in step.sampling:
            request.num_computed_tokens -= request.num_unverified
            request.num_unverified = 0
        rows = [request for request in step.sampling if request.finish_reason is None]
        accepted, depth = dict.fromkeys(rows, 0), 0
        while rows:
            places = [first[request] + depth for request in rows]
            given = (step.logits[places], None) if tokens is None else (None, tokens[places])
            outputs += append(step, rows, *given)
            stands = []
            for request in rows:
                drafts = step.drafts.get(request, NO_DRAFTS)
                is_left_out = request.finish_reason == "error" or request in step.late
                if is_left_out or len(drafts) <= depth:
                    continue
                if tokens is None:
                    is_right = drafts.tokens[depth] == request.token_ids[-1]
                else:
                    is_right = bool(tokens[first[request] + depth + 1] != REJECTED)
                accepted[request] += is_right
                if is_right and request.finish_reason is None:
                    # it is computed, unless the request was preempted since
                    request.num_computed_tokens += request.slot >= 0
                    scheduler.take_token(request)
                    stands.append(request)
            rows, depth = stands, depth + 1
        for request, drafts in step.drafts.items():
            if (count := accepted.get(request)) is None:
                continue
            step.num_rejected[request] = len(drafts) - count
            # one that has left since had them for the last time
            if request.drafts is not None:
                request.drafts.observe(len(drafts), count)
            stats.count_drafts(len(drafts), count)
            request.state.num_draft_tokens += len(drafts)
            request.state.num_accepted_tokens += count
        return outputs

    def propose(self, step: LaunchedStep) -> dict[Request, Drafts]:
        """Drafts of the next step, as many as pay by what the steps taken so far have shown."""
        num_rows, counts = len(step.sampling), dict[Request, int]()
        # for requests that leave now too: others may share the blocks that the step filled
        runs = not self._is_off and any(request.drafts is not None for request in step.scheduled)
        states = {
            request: request.drafts
            for request in step.sampling
            if request.finish_reason is None
            and request.drafts is not None
            and request not in step.late
        }
        for request in step.late:
            # the masks after its drafts would be late, too
            if request.drafts is not None:
                self._leave(request)
        if states:
            times, share = self.costs.of(num_rows, len(states)), num_rows / len(states)
            for request, state in states.items():
                if count := state.length(times, share):
                    counts[request] = count
                elif self.drafter.is_layer:
                    self._leave(request)
        try:
            proposals = self.drafter.propose(step, counts) if runs else {}
        except Exception:
            # the step has given its tokens, which a draft is not worth losing
            logger.exception("speculative decoding is off from now on: the drafter failed")
            self._is_off, proposals = True, {}
        if not self.drafter.is_layer:
            self.waits = any(proposals.values())
            # those here would come before the tokens on their way
            proposals = {} if step.is_in_flight else proposals
        for request, drafts in proposals.items():
            if drafts and not drafts.is_pending and request.grammar is not None:
                proposals[request] = drafts.first(request.grammar.count_allowed(drafts.tokens))
        return proposals
