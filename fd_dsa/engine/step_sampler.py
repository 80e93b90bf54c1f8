"""From a step's logits to a token for each of its requests, on the host or where the logits are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.draft_state import NO_DRAFTS, Drafts
from fd_dsa.engine.launched_step import LaunchedStep
from fd_dsa.engine.logprobs import TokenScore, score_tokens
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampler import Sampler
from fd_dsa.environment import batch_invariant
from fd_dsa.ops.sampling.parameters import MAX_ENTRIES, SlotParameters
from fd_dsa.ops.sampling.token_buffer import NO_TOKEN
from fd_dsa.runner.input_batch import Draw
from fd_dsa.runner.protocol import Runner


class StepSampler:
    """Samples the rows of a step; parameters are given to a sampler when a request takes its slot.

    A runner whose logits are on a device may have `draws` (`DeviceDraws`); it serves the steps none
    of whose requests asks for log-probabilities, or changes the logits of too many tokens. Its
    draws at a temperature may differ from the host's within rounding, so with
    FD_DSA_BATCH_INVARIANT=1, where company must not decide who samples, it serves greedy requests
    alone.

    Args:
        runner: see LLMEngine.
        num_slots: rows of a step.
    """

    def __init__(self, runner: Runner, num_slots: int) -> None:
        self._vocab_size, self._sampler = runner.vocab_size, Sampler(num_slots)
        self._device = runner.info.sampling
        self._draws_greedy_alone = batch_invariant()
        # arrival number of the request whose parameters the samplers have in a slot
        self._taken_by = [-1] * num_slots

    def queue(self, step: LaunchedStep, logits_indices: npt.NDArray[np.int64]) -> bool:
        """Queue the step, and the draw of its tokens unless that needs a mask.

        Args:
            step: whose requests and drafts are those of the rows of `logits_indices`, in order.
            logits_indices: see Runner.

        Returns:
            False, and nothing is done, where the host must sample.
        """
        sampling, device = step.sampling, self._device
        if device is None or step.reading or not sampling:
            return False
        if any(request.logprobs is not None for request in sampling):
            return False
        if self._draws_greedy_alone and any(request.params.temperature for request in sampling):
            return False
        rules = [request.rules for request in sampling if request.rules is not None]
        if any(rule.num_entries > MAX_ENTRIES for rule in rules):
            return False
        slots, positions = self._places(sampling)
        firsts: Sequence[int] = range(len(sampling) + 1)
        if step.drafts:
            firsts = step.first_rows
            ranges = [range(end - first) for first, end in pairwise(firsts)]
            positions = [p + i for p, own in zip(positions, ranges, strict=True) for i in own]
            slots = [slot for slot, own in zip(slots, ranges, strict=True) for _ in own]
        masked: list[int] = []
        for (first, end), request in zip(pairwise(firsts), sampling, strict=True):
            if request.rules and request.rules.needs_mask:
                masked += range(first, end)
                if step.drafts.get(request, NO_DRAFTS).is_pending and step.known_drafts is None:
                    step.known_drafts = device.draws.read_drafts()
        step.places = Draw(slots, positions, firsts, masked)
        device.queue_model(logits_indices, step.places)
        if not masked:
            self.draw(step)
        return True

    def draw(self, step: LaunchedStep) -> None:
        """Queue the draw of a step that is queued; masks are those after the tokens known now."""
        assert step.places is not None
        masks: list[npt.NDArray[np.int32]] = []
        if step.known_drafts is not None:
            self.read_drafts(step)
        for request in step.sampling if step.places.masked else ():
            if request.rules is not None and request.rules.needs_mask:
                drafts = step.drafts.get(request, NO_DRAFTS).tokens
                has_ended = request.finish_reason is not None
                size = self._vocab_size
                made = request.rules.masks(size, drafts, has_ended)
                if made is None:
                    # the device samples and counts a token that nobody gets
                    self._taken_by[request.slot] = -1
                    step.leave_out(request)
                    made = request.rules.masks(size, drafts, has_ended=True) or []
                masks += made
        assert self._device is not None, "a step is enqueued on a device only"
        step.draw = self._device.draw(masks)

    def read_drafts(self, step: LaunchedStep) -> None:
        """Fill in drafts that a device has, of a step that needs masks or that the host samples."""
        if any(drafts.is_pending for drafts in step.drafts.values()):
            assert self._device is not None, "only a device has drafts that the host has not"
            ids = (step.known_drafts or self._device.draws.read_drafts())()
            step.drafts = {
                request: Drafts(ids[drafts.tokens].tolist())
                for request, drafts in step.drafts.items()
            }

    def forget(self) -> None:
        """What was drawn last is not the requests': parameters are to be given again."""
        self._taken_by = [-1] * len(self._taken_by)

    def sample(
        self, sampling: Sequence[Request], logits: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], list[TokenScore | None]]:
        """Tokens of the requests, see `Sampler.sample`, and scores of those that ask for them."""
        tokens = self._sampler.sample(logits, *map(np.array, self._places(sampling)))
        scores: list[TokenScore | None] = [None] * len(sampling)
        scored = [
            row
            for row, request in enumerate(sampling)
            if request.logprobs is not None and tokens[row] >= 0
        ]
        if scored:
            num_top = [sampling[row].params.logprobs or 0 for row in scored]
            sampled_scores = score_tokens(logits[scored], tokens[scored], num_top)
            for row, score in zip(scored, sampled_scores, strict=True):
                scores[row] = score
        for request in sampling if self._device is not None else ():
            if request.rules is not None and request.rules.counts is not None:
                # a device has not counted this token
                self._taken_by[request.slot] = -1
        return tokens, scores

    def draft(
        self, requests: Sequence[Request], logits: npt.NDArray[np.float32], depth: int
    ) -> npt.NDArray[np.int64]:
        """Tokens drawn as those `depth` tokens later will be; the rules are those of now.

        Returns:
            int64 [n]; negative where the logits or the rules leave none, or a mask is late.
        """
        slots, positions = map(np.array, self._places(requests))
        positions += depth
        grammars = (request.grammar for request in requests)
        has_mask = np.array([g is None or g.await_mask() for g in grammars], bool)
        if has_mask.all():
            # no copy of the logits
            return self._sampler.sample(logits, slots, positions)
        tokens = np.full(len(requests), NO_TOKEN, np.int64)
        tokens[has_mask] = self._sampler.sample(
            logits[has_mask], slots[has_mask], positions[has_mask]
        )
        return tokens

    def _places(self, sampling: Sequence[Request]) -> tuple[list[int], list[int]]:
        """Slot of each request and position of its next token; new ones give their parameters."""
        slots, positions = [], []
        for request in sampling:
            slots.append(request.slot)
            positions.append(request.num_output_tokens)
            if self._taken_by[request.slot] != request.arrival:
                self._take(request)
        return slots, positions

    def _take(self, request: Request) -> None:
        slot, params, rules = request.slot, request.params, request.rules
        if request.arrival in self._taken_by:
            # it had another slot before it was preempted, whose counts end there
            self._taken_by[self._taken_by.index(request.arrival)] = -1
        self._taken_by[slot] = request.arrival
        self._sampler.set_slot(slot, params, request.seed, rules)
        if self._device is None or (rules is not None and rules.num_entries > MAX_ENTRIES):
            return
        plain = (params.temperature, params.min_p, max(params.top_k, 0), params.top_p, request.seed)
        given = SlotParameters(*plain)
        if rules is not None:
            banned: tuple[Any, ...] = (rules.banned.tolist(), rules.end_ids.tolist())
            # a mask has them
            banned = ((), (), 0) if rules.needs_mask else (*banned, rules.min_tokens)
            given = SlotParameters(*plain, *rules.penalties, params.logit_bias or {}, *banned)
        counted: tuple[list[int], ...] = ()
        if given.is_penalized:
            counted = request.state.prompt_token_ids, request.output_token_ids
        self._device.draws.set_slot(slot, given, *counted)
