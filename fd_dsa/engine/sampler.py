"""Tokens of a step from its logits, on the host or on the device.

A token depends only on its logits and the parameters, seed and position of its request. Random
numbers are counter-based: each is a function of seed and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.batch import Drafts, ScheduledBatch
from fd_dsa.engine.draws import RowDraw, uniforms
from fd_dsa.engine.logit_rules import LogitRules, apply_rules
from fd_dsa.engine.logprobs import TokenScore, score_tokens
from fd_dsa.engine.output import TopkPositions
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.environment import batch_invariant
from fd_dsa.ops.sampling.parameters import (
    GREEDY_BELOW,
    MAX_ENTRIES,
    MAX_TEMPERATURE,
    RowParameters,
)
from fd_dsa.ops.sampling.token_buffer import NO_TOKEN, NOT_FINITE
from fd_dsa.runner.input_batch import SamplingInputs
from fd_dsa.runner.protocol import Logits, Runner
from fd_dsa.tensor import Float32, Int64


class Sampler:
    """Sampler of the host: one token for each row, by the parameters of its batch row.

    The steps are the rules of the request, temperature, and three cuts:

    - min-p: tokens with at least this share of the largest probability,
    - top-k: the k largest logits, ties to the lower id,
    - top-p: the fewest largest of the rest with at least this share of their mass.

    The inverse distribution function in the order of ids gives the token. The distribution is exact
    up to rounding.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._draws: list[tuple[float, float, int, float]] = [(1.0, 0.0, 0, 1.0)] * max_num_seqs
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._is_random = np.zeros(max_num_seqs, bool)
        self._is_ruled = np.zeros(max_num_seqs, bool)
        self._rules: list[LogitRules | None] = [None] * max_num_seqs
        self._row_draw: RowDraw | None = None

    def set_parameters(
        self, batch_row: int, params: SamplingParams, seed: int, rules: LogitRules | None = None
    ) -> None:
        """Set the parameters of the request in a batch row, and its rules if it has any."""
        temperature = min(params.temperature, MAX_TEMPERATURE)
        self._draws[batch_row] = (temperature, params.min_p, max(params.top_k, 0), params.top_p)
        self._seeds[batch_row] = seed % 2**64
        self._is_random[batch_row] = params.temperature >= GREEDY_BELOW
        self._is_ruled[batch_row] = rules is not None
        self._rules[batch_row] = rules

    def sample(self, logits: Float32, batch_rows: Int64, positions: Int64) -> Int64:
        """Sample one token for each row.

        Args:
            logits: float32 [num_rows, vocab_size]; stay unchanged.
            batch_rows: int64 [num_rows]; batch row of each row of logits.
            positions: int64 [num_rows]; position of the token in the output of its request, from 0.

        Returns:
            int64 [num_rows]; token ids, NOT_FINITE if the logits are unusable, NO_TOKEN if the
            rules exclude every token. Greedy ties go to the lowest id.

        Cost: one pass for greedy rows. Other rows take a few passes, most of them over data in the
        processor's cache, and sorts of small candidate sets. Rows with rules take one copy more.
        """
        is_random, is_ruled = self._is_random[batch_rows], self._is_ruled[batch_rows]
        if not is_ruled.any():
            return self._choose(logits, batch_rows, positions, is_random)
        tokens = self._choose(logits, batch_rows, positions, is_random & ~is_ruled)
        ruled = np.flatnonzero(is_ruled & (tokens != NOT_FINITE))
        if len(ruled):
            adjusted = logits[ruled]
            rules = [self._rules[batch_row] for batch_row in batch_rows[ruled].tolist()]
            apply_rules(adjusted, [rule for rule in rules if rule is not None])
            chosen = self._choose(adjusted, batch_rows[ruled], positions[ruled], is_random[ruled])
            tokens[ruled] = np.where(chosen == NOT_FINITE, NO_TOKEN, chosen)
        return tokens

    def _choose(
        self, logits: Float32, batch_rows: Int64, positions: Int64, is_random: npt.NDArray[np.bool_]
    ) -> Int64:
        """Sample tokens of the random rows, and take the largest logits of the others."""
        tokens = np.empty(len(logits), np.int64)
        tokens.fill(NOT_FINITE)
        (greedy,), (sampled,) = (~is_random).nonzero(), is_random.nonzero()
        if len(greedy):
            rows = logits if len(greedy) == len(logits) else logits[greedy]
            best = rows.argmax(axis=1)
            # argmax stops at a NaN, so the largest value shows whether the row is usable
            usable = np.isfinite(rows[np.arange(len(rows)), best])
            tokens[greedy[usable]] = best[usable]
        if len(sampled):
            batch_rows = batch_rows[sampled]
            numbers = uniforms(self._seeds[batch_rows], positions[sampled])
            if self._row_draw is None or self._row_draw.vocab_size != logits.shape[1]:
                self._row_draw = RowDraw(logits.shape[1])
            draw = self._row_draw.draw
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                for row, batch_row, number in zip(
                    sampled.tolist(), batch_rows.tolist(), numbers.tolist(), strict=True
                ):
                    tokens[row] = draw(logits[row], number, *self._draws[batch_row])
        return tokens


class StepSampler:
    """Samples the rows of a step on the device if it can, else on the host.

    A sampler gets the parameters of a request when the request takes a batch row. The device
    samples steps in which no request asks for log-probabilities, or changes the logits of too many
    tokens. At a temperature its tokens may differ from the host's within rounding. With
    FD_DSA_BATCH_INVARIANT=1 the batch must not decide who samples, so the device then samples only
    greedy requests.

    Args:
        runner: see LLMEngine.
        num_rows: number of batch rows.
    """

    def __init__(self, runner: Runner, num_rows: int) -> None:
        self._vocab_size, self._sampler = runner.vocab_size, Sampler(num_rows)
        self._device = runner.info.sampling
        self._is_device_greedy_only = batch_invariant()
        # `seq_id` of the request whose parameters the samplers have for a batch row
        self._owners = [-1] * num_rows

    def execute(self, runner: Runner, batch: ScheduledBatch, may_ask: bool = False) -> None:
        """Enqueue a step if the device samples, else run it and wait for its logits.

        Args:
            runner: runs the step.
            batch: step in the runner's input batch.
            may_ask: True if a request may ask for its selected keys.
        """
        if may_ask:
            batch.logits = _execute_with_selections(runner, batch)
        elif not self.enqueue(batch):
            batch.logits = runner.execute_model(batch.logits_indices)
            self.read_drafts(batch)

    def enqueue(self, batch: ScheduledBatch) -> bool:
        """Enqueue a step on the device, with its sampling unless that waits for masks.

        Returns:
            False if the host must sample; the step is not enqueued then.
        """
        sampling, device = batch.sampling, self._device
        if device is None or not self._may_sample_on_device(batch):
            return False
        batch_rows, positions = self._rows_and_positions(sampling)
        mask_rows: list[int] = []
        if batch.drafts:
            ranges = [range(end - first) for first, end in pairwise(batch.logits_indptr)]
            positions = [p + i for p, own in zip(positions, ranges, strict=True) for i in own]
            batch_rows = [
                batch_row for batch_row, own in zip(batch_rows, ranges, strict=True) for _ in own
            ]
        if masked := [r for r in sampling if r.rules is not None and r.rules.needs_mask]:
            mask_rows = _mask_rows(batch, masked)
            own = [batch.drafts_of(request) for request in masked]
            if any(drafts.is_pending for drafts in own):
                batch.pending_drafts = device.read_drafts()
        batch.sampling_inputs = SamplingInputs(
            batch_rows, positions, batch.logits_indptr, mask_rows
        )
        device.enqueue_model(batch.logits_indices, batch.sampling_inputs)
        if not masked:
            batch.future = device.sample()
        return True

    def _may_sample_on_device(self, batch: ScheduledBatch) -> bool:
        """Return True if the device can sample for all requests of a step."""
        sampling = batch.sampling
        if batch.scoring or not sampling:
            return False
        if any(request.logprobs is not None for request in sampling):
            return False
        if self._is_device_greedy_only and any(r.params.temperature for r in sampling):
            return False
        rules = [request.rules for request in sampling if request.rules is not None]
        return all(rule.num_entries <= MAX_ENTRIES for rule in rules)

    def enqueue_late_samples(self, batch: ScheduledBatch) -> None:
        """Enqueue the sampling of an enqueued step, with masks after the tokens known now."""
        assert self._device is not None, "only a device has enqueued steps"
        masks: list[npt.NDArray[np.int32]] = []
        if batch.pending_drafts is not None:
            self.read_drafts(batch)
        for request in batch.sampling:
            if request.rules is not None and request.rules.needs_mask:
                drafts = batch.drafts_of(request).tokens
                has_ended = request.finish_reason is not None
                size = self._vocab_size
                made = request.rules.masks(size, drafts, has_ended)
                if made is None:
                    # the device samples and counts a token that the request does not get
                    self._owners[request.batch_row] = -1
                    batch.postpone(request)
                    made = request.rules.masks(size, drafts, has_ended=True) or []
                masks += made
        batch.future = self._device.sample(masks)

    def read_drafts(self, batch: ScheduledBatch) -> None:
        """Replace pending drafts of a step by their ids, for masks or sampling on the host."""
        if any(drafts.is_pending for drafts in batch.drafts.values()):
            assert self._device is not None, "only a device has pending drafts"
            ids = (batch.pending_drafts or self._device.read_drafts()).result()
            batch.drafts = {
                request: Drafts(ids[drafts.tokens].tolist())
                for request, drafts in batch.drafts.items()
            }

    def invalidate(self) -> None:
        """Set the parameters of all requests again, because the newest samples were dropped."""
        self._owners = [-1] * len(self._owners)

    def tokens(
        self, batch: ScheduledBatch, requests: Sequence[Request], rows: Sequence[int]
    ) -> tuple[list[int], list[TokenScore | None]]:
        """Return the token of each request, and scores of requests that ask for them.

        Args:
            batch: step whose samples or logits the host has.
            requests: some requests of the step.
            rows: ascending row of logits of each request.
        """
        if (ids := batch.token_ids) is not None:
            ids = ids if len(rows) == len(ids) else ids[rows]
            return ids.tolist(), [None] * len(requests)
        logits = batch.logits
        assert logits is not None, "the step has neither samples nor logits"
        # no copy of the logits if all rows are wanted
        logits = logits if len(rows) == len(logits) else logits[rows]
        tokens, scores = self.sample(requests, logits)
        return tokens.tolist(), scores

    def sample(
        self, sampling: Sequence[Request], logits: Float32
    ) -> tuple[Int64, list[TokenScore | None]]:
        """Sample the next token of each request on the host.

        Args:
            sampling: requests.
            logits: float32 [num_requests, vocab_size].

        Returns:
            Tokens, see `Sampler.sample`, and scores of requests that ask for them.
        """
        tokens = self._sampler.sample(logits, *map(np.array, self._rows_and_positions(sampling)))
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
                # the device has not counted this token
                self._owners[request.batch_row] = -1
        return tokens, scores

    def draft(self, requests: Sequence[Request], logits: Float32, depth: int) -> Int64:
        """Sample drafts on the host, with the random numbers of the token at their position.

        The rules are those of the output without drafts.

        Args:
            requests: requests that want a draft.
            logits: float32 [num_requests, vocab_size].
            depth: number of tokens from the next token of the output to the draft.

        Returns:
            int64 [num_requests]; a negative result code if no token is allowed, the logits are
            unusable or a mask is late.
        """
        batch_rows, positions = map(np.array, self._rows_and_positions(requests))
        positions += depth
        grammars = (request.grammar for request in requests)
        has_mask = np.array([g is None or g.await_mask() for g in grammars], bool)
        if has_mask.all():
            # no copy of the logits
            return self._sampler.sample(logits, batch_rows, positions)
        tokens = np.full(len(requests), NO_TOKEN, np.int64)
        tokens[has_mask] = self._sampler.sample(
            logits[has_mask], batch_rows[has_mask], positions[has_mask]
        )
        return tokens

    def _rows_and_positions(self, sampling: Sequence[Request]) -> tuple[list[int], list[int]]:
        """Return the batch row of each request, and the position of its next token.

        The samplers get the parameters of requests that are new in their row.
        """
        batch_rows, positions = [], []
        for request in sampling:
            batch_rows.append(request.batch_row)
            positions.append(request.num_output_tokens)
            if self._owners[request.batch_row] != request.seq_id:
                self._set_parameters(request)
        return batch_rows, positions

    def _set_parameters(self, request: Request) -> None:
        """Set the parameters of a request in both samplers."""
        batch_row, params, rules = request.batch_row, request.params, request.rules
        if request.seq_id in self._owners:
            # the counts of the row that the request had before its preemption are out of date
            self._owners[self._owners.index(request.seq_id)] = -1
        self._owners[batch_row] = request.seq_id
        self._sampler.set_parameters(batch_row, params, request.seed, rules)
        if self._device is None or (rules is not None and rules.num_entries > MAX_ENTRIES):
            return
        plain = (params.temperature, params.min_p, max(params.top_k, 0), params.top_p, request.seed)
        given = RowParameters(*plain)
        if rules is not None:
            banned: tuple[Any, ...] = (rules.banned.tolist(), rules.end_ids.tolist())
            # a mask already excludes the banned tokens
            banned = ((), (), 0) if rules.needs_mask else (*banned, rules.min_tokens)
            given = RowParameters(*plain, *rules.penalties, params.logit_bias or {}, *banned)
        counted: tuple[list[int], ...] = ()
        if given.is_penalized:
            counted = request.state.prompt_token_ids, request.output_token_ids
        self._device.set_parameters(batch_row, given, *counted)


def _execute_with_selections(runner: Runner, batch: ScheduledBatch) -> Logits:
    """Run a step, and keep the selected keys of requests that ask for them.

    Such requests have no drafts.
    """
    rows = zip(batch.sampling, batch.logits_indptr, strict=False)
    asking = {row: request for request, row in rows if request.params.return_topk_positions}
    if not asking:
        return runner.execute_model(batch.logits_indices)
    collector, indices = runner.info.selections, batch.logits_indices
    assert collector is not None, "`limits` refuses such requests without it"
    logits, selections = collector.execute_with_selections(indices, indices[list(asking)])
    for request, layers in zip(asking.values(), selections, strict=True):
        request.topk_positions = TopkPositions(len(request.token_ids) - 1, layers)
    return logits


def _mask_rows(batch: ScheduledBatch, masked: Sequence[Request]) -> list[int]:
    """Return the index of the mask of each row of logits, -1 = no mask."""
    rows, num_masks, has_mask = list[int](), 0, set(masked)
    for (first, end), request in zip(pairwise(batch.logits_indptr), batch.sampling, strict=True):
        count = end - first
        if request in has_mask:
            rows += range(num_masks, num_masks + count)
            num_masks += count
        else:
            rows += [-1] * count
    return rows
