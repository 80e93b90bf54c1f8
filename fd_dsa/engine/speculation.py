"""Speculative decoding: which drafts a step verifies, and which of them stand.

A draw is a function of a request's seed and the position in its output. So a draft stands where it
is the token that is drawn there without drafts, and no token of an output depends on drafts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.draft_state import DraftState
from fd_dsa.engine.launched_step import LaunchedStep
from fd_dsa.engine.metrics import EngineStats
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampler import REJECTED
from fd_dsa.engine.scheduler import Scheduler
from fd_dsa.engine.step_costs import StepCosts, doubling

logger = logging.getLogger(__name__)


class Drafter(Protocol):
    """Proposes tokens.

    Attributes:
        lookahead: tokens that must be known after a block's own before others may share it.
        is_ahead: whether it needs no tokens on the host.
    """

    lookahead: int
    is_ahead: bool

    def propose(
        self, step: LaunchedStep, counts: Mapping[Request, int]
    ) -> dict[Request, list[int]]:
        """Tokens that may follow those of some requests.

        Args:
            step: the one that has just given its requests their tokens, or will give them.
            counts: requests that go on, and most drafts of each; 0 where none is wanted.
        """


class Speculator:
    """Has drafts made after each step, and verifies them in the next one.

    Args:
        drafter: makes them.
        most: drafts of a request in a step.
        costs: of steps.

    Attributes:
        clock: seconds; what the host's part of steps is measured with.
        waits: whether drafts come of the tokens of the next step, so that none is queued before.
    """

    def __init__(self, drafter: Drafter, most: int, costs: StepCosts | None = None) -> None:
        self.drafter, self.most = drafter, most
        self._costs = costs or StepCosts()
        self._is_off = self.waits = False
        self.clock: Callable[[], float] = time.perf_counter
        # the newest step and its kind, and when its drafts were proposed
        self._newest: tuple[Any, Any, float] = None, None, 0.0

    def begin(self, request: Request, num_rows: int) -> None:
        """Let a request have drafts, unless it must not or does not want to, or none would pay.

        Args:
            request: that has computed nothing.
            num_rows: of a step that it will be in.
        """
        params = request.params
        if params.speculative and not params.return_topk_positions and self._may_pay(num_rows):
            request.drafts = DraftState(self.most)
        else:
            self.leave(request)

    def _may_pay(self, num_rows: int) -> bool:
        """Whether drafts that nothing is known of pay in such steps, or need no layer."""
        if not self._costs.has_layer:
            return True
        return DraftState(self.most).length(self._costs.of(num_rows, num_rows, self.most)) > 0

    def leave(self, request: Request) -> None:
        """Give a request no drafts from now on.

        The drafter's caches need not be written for it, so its blocks from now on have other keys.
        """
        request.drafts = None
        if self._costs.has_layer:
            request.block_keys.leave_drafts()

    def drafts_after(self, scheduled: list[Request], num_rows: int) -> bool:
        """Whether the drafter runs after a step: its layer is left out where no request drafts.

        Prompts are left without drafts where these do not pay for all rows that there are by now.
        """
        prompts = [one for one in scheduled if one.drafts and not one.num_output_tokens]
        if prompts and not self._may_pay(num_rows):
            for request in prompts:
                self.leave(request)
        is_left_out = self._costs.has_layer and all(one.drafts is None for one in scheduled)
        return not self._is_off and not is_left_out

    def verify(
        self,
        step: LaunchedStep,
        append: Callable[[list[Request], Any, Any], list[RequestOutput]],
        scheduler: Scheduler,
        stats: EngineStats,
        tokens: npt.NDArray[np.int64] | None,
    ) -> list[RequestOutput]:
        """Give the requests of a step their tokens: one, and one for each draft that stands.

        Those that ended while it was in flight get none.

        Args:
            step: with drafts.
            append: gives each of some requests a token: the one drawn, or sampled from logits.
            scheduler: learns which drafts stand.
            stats: counts them.
            tokens: of all rows, REJECTED after a wrong draft, where a device has drawn them.

        Returns:
            Outputs of requests for which there is no token.
        """
        sampling = step.sampling
        drafts = [step.drafts.get(request, []) for request in sampling]
        first = step.first_rows
        accepted = [0] * len(sampling)
        outputs: list[RequestOutput] = []
        alive = [row for row, request in enumerate(sampling) if request.finish_reason is None]
        for request in sampling:
            request.num_computed_tokens -= request.num_unverified
            request.num_unverified = 0
        rows, depth = alive, 0
        while rows:
            places, requests = [first[row] + depth for row in rows], [sampling[row] for row in rows]
            given = (step.logits[places], None) if tokens is None else (None, tokens[places])
            outputs += append(requests, *given)
            stands = []
            for row in rows:
                request = sampling[row]
                if request.finish_reason == "error" or len(drafts[row]) <= depth:
                    continue
                if tokens is None:
                    is_right = drafts[row][depth] == request.token_ids[-1]
                else:
                    is_right = tokens[first[row] + depth + 1] != REJECTED
                if not is_right:
                    continue
                accepted[row] += 1
                if request.finish_reason is None:
                    scheduler.accept_draft(request)
                    stands.append(row)
            rows, depth = stands, depth + 1
        for row in alive:
            request, own, count = sampling[row], drafts[row], accepted[row]
            if step.is_in_flight:
                scheduler.reject_drafts(request, len(own) - count)
            if own:
                # one that has left since had them for the last time
                if request.drafts is not None:
                    request.drafts.observe(len(own), count)
                stats.count_drafts(len(own), count)
                request.state.num_draft_tokens += len(own)
                request.state.num_accepted_tokens += count
        return outputs

    def propose(self, step: LaunchedStep) -> None:
        """Have the drafts of the next step made, by what the steps taken so far have shown."""
        self._observe(step)
        going_on = [
            (request, request.drafts)
            for request in step.sampling
            if request.finish_reason is None and request.drafts is not None
        ]
        counts, num_rows = {}, len(step.sampling)
        if going_on and not self._costs.lacks_plain(num_rows):
            costs = self._costs.of(num_rows, len(going_on), self.most)
            share = num_rows / len(going_on)
            for request, state in going_on:
                counts[request] = state.length(costs, share)
                if not counts[request] and self._costs.has_layer:
                    del counts[request]
                    self.leave(request)
        try:
            # for requests that leave now too: others may share the blocks that the step filled
            proposals = self.drafter.propose(step, counts) if step.makes_drafts else {}
        except Exception:
            # the step has given its tokens, which a draft is not worth losing
            logger.exception("speculative decoding is off from now on: the drafter failed")
            self._is_off, proposals = True, {}
        if not self.drafter.is_ahead:
            self.waits = any(proposals.values())
            # those here would come before the tokens on their way
            proposals = {} if step.is_in_flight else proposals
        for request, state in going_on:
            state.proposal = proposal = proposals.get(request, [])
            if proposal and proposal[0] >= 0 and request.grammar is not None:
                del proposal[request.grammar.count_allowed(proposal) :]

    def _observe(self, step: LaunchedStep) -> None:
        """Learn what the host needs for a step after one of its kind, and in turns the device."""
        kind, num_rows = None, len(step.sampling)
        if step.draw is not None and not step.num_prefill_tokens:
            kind = doubling(num_rows), step.num_drafts > 0, step.is_in_flight
        (before, its_kind, since), now = self._newest, self.clock()
        self._newest = step, kind, now
        if kind is not None and kind == its_kind:
            waited = before.waited if step.is_in_flight else 0.0
            self._costs.observe(now - since - waited, num_rows, step.num_drafts)
