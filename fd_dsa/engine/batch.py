"""Record of a step in the engine: the tokens that it computes, and its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from fd_dsa.engine.metrics import EngineMetrics
from fd_dsa.engine.request import Request
from fd_dsa.engine.step_times import StepShape
from fd_dsa.ops.sampling.token_buffer import REJECTED
from fd_dsa.runner.input_batch import InputBatch, SamplingInputs
from fd_dsa.runner.protocol import Indices, Logits, StepFuture


@dataclass(frozen=True, slots=True)
class Drafts:
    """Draft tokens of a request for one step.

    Attributes:
        tokens: their ids, or their indices in the `TokenBuffer` if only the device has the ids.
        is_pending: True if `tokens` are indices.
    """

    tokens: list[int]
    is_pending: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> Drafts:
        """Return the first `count` drafts."""
        return Drafts(self.tokens[:count], self.is_pending)


NO_DRAFTS = Drafts([])


@dataclass(slots=True)
class ScheduledBatch:
    """Requests and tokens of one step, from its scheduling until its tokens are processed.

    The scheduler chooses requests and drafts, `fill` writes their tokens into the runner's input
    batch, and the engine keeps here what the runner returns. A step samples either on the device,
    which gives a `future`, or on the host, which needs `logits`.

    Attributes:
        requests: requests of the step in the order of their batch rows. The step computes
            `num_scheduled_tokens` of each.
        drafts: drafts that the step verifies.
        snapshot_slots: places of the snapshots that the step writes.
        prefill_context: mean number of tokens before each prefill token in its request.
        shape: sizes that determine the time of the step.
        sampling: requests that get a token.
        prefilled: requests of `sampling` whose prefill ends with this step.
        logits_indptr: first row of logits of each request of `sampling`, then the number of their
            rows. A request has one row for its own token and one for each draft.
        scoring: requests whose prompt is scored, and the number of their rows of logits, which
            follow those of `sampling`.
        logits_indices: int64 [num_rows]; flat token of the step for each row of logits.
        ready_time: when the step could be enqueued, seconds of the engine's clock.
        sampling_inputs: how the device samples; None if the host samples.
        future: handle of the samples; None if the host samples, or until late masks are made.
        pending_drafts: handle of the token buffer, if late masks depend on pending drafts.
        logits: float32 [num_rows, vocab_size], if the host samples.
        token_ids: int64 [num_rows]; result of `future`.
        is_in_flight: True if the next step is scheduled before the host has the tokens.
        late: requests that get no token, because the mask of their grammar is late.
        num_accepted: number of accepted drafts of each request that ran until its tokens came.
    """

    requests: list[Request]
    drafts: Mapping[Request, Drafts]
    snapshot_slots: Mapping[Request, int] = field(default_factory=dict)
    prefill_context: int = 0
    shape: StepShape = field(init=False)
    sampling: list[Request] = field(default_factory=list)
    prefilled: list[Request] = field(default_factory=list)
    logits_indptr: Sequence[int] = (0,)
    scoring: list[tuple[Request, int]] = field(default_factory=list)
    logits_indices: Indices = field(init=False)
    ready_time: float = 0.0
    sampling_inputs: SamplingInputs | None = None
    future: StepFuture | None = None
    pending_drafts: StepFuture | None = None
    logits: Logits | None = None
    token_ids: Indices | None = None
    is_in_flight: bool = False
    late: set[Request] = field(default_factory=set)
    num_accepted: dict[Request, int] = field(default_factory=dict)

    @property
    def has_late_masks(self) -> bool:
        """True while the device waits for masks, which depend on the tokens of the step before."""
        return self.sampling_inputs is not None and self.future is None

    def fill(self, input_batch: InputBatch) -> None:
        """Write the tokens of the step into the runner's input batch."""
        input_batch.begin_step()
        batch_rows, lengths, computed = list[int](), list[int](), list[int]()
        ids, are_prefills, pending = list[int](), list[bool](), dict[int, int]()
        sampled, scored = list[int](), list[int]()
        sampling, prefilled, drafts = self.sampling, self.prefilled, self.drafts
        for request in self.requests:
            first, begin = len(ids), request.num_computed_tokens
            end = begin + request.num_scheduled_tokens
            samples = end == request.num_tokens
            batch_rows.append(request.batch_row)
            computed.append(begin)
            # same as Request.is_decode, for the chunk: only the token sampled last is missing
            is_decode = samples and end - begin == 1 and request.num_output_tokens > 0
            are_prefills.append(not is_decode)
            if request.pending_row < 0:
                ids += request.token_ids[begin:end]
            else:
                pending[len(ids)] = request.pending_row
                ids.append(0)
            last = len(ids) - 1
            if samples:
                sampling.append(request)
                if not is_decode:
                    prefilled.append(request)
                own = drafts.get(request, NO_DRAFTS)
                if own.is_pending:
                    pending.update(enumerate(own.tokens, len(ids)))
                ids += [0] * len(own) if own.is_pending else own.tokens
                sampled += range(last, len(ids))
            else:
                input_batch.next_prompt_tokens[last] = request.token_ids[end]
            lengths.append(len(ids) - first)
            scores = request.prompt_logprobs
            if scores is not None and request.wants_prompt_logits:
                unscored = scores.unscored(begin, end)
                if unscored:
                    self.scoring.append((request, len(unscored)))
                    scored += [last + 1 - end + position for position in unscored]
        input_batch.add_rows(batch_rows, lengths, ids, computed, are_prefills, pending)
        input_batch.pending_source[batch_rows] = [request.pending_row for request in self.requests]
        for request, slot in self.snapshot_slots.items():
            input_batch.snapshot_slots[request.batch_row] = slot
        self._count_tokens(input_batch)
        self.logits_indices = np.array(sampled + scored, np.int64)

    def _count_tokens(self, input_batch: InputBatch) -> None:
        """Set the numbers of tokens, and of the rows of logits of each request."""
        num_prefill = input_batch.num_prefill_tokens
        sizes = input_batch.num_tokens - num_prefill, num_prefill, self.prefill_context
        self.shape = StepShape(*sizes, input_batch.max_seqlen_k)
        self.logits_indptr = range(len(self.sampling) + 1)
        if self.drafts:
            counts = [1 + len(self.drafts_of(request)) for request in self.sampling]
            self.logits_indptr = list(accumulate(counts, initial=0))

    def advance_optimistically(self) -> None:
        """Count pending tokens of the requests as if all drafts were accepted."""
        self.is_in_flight = True
        for row, request in enumerate(self.sampling):
            if request.finish_reason is None and request not in self.late:
                num_drafts = len(self.drafts_of(request)) if self.drafts else 0
                request.pending_row, request.num_pending_drafts = row, num_drafts
                request.num_computed_tokens += num_drafts

    def begin_verification(self) -> tuple[list[Request], list[int]]:
        """Take back the count of pending drafts, because the tokens have come.

        Returns:
            Running requests of `sampling`, and their first rows of logits.
        """
        rows = dict[Request, int]()
        for request, row in zip(self.sampling, self.logits_indptr, strict=False):
            request.num_computed_tokens -= request.num_pending_drafts
            request.num_pending_drafts = 0
            if request.finish_reason is None:
                rows[request] = row
        self.num_accepted = dict.fromkeys(rows, 0)
        return list(rows), list(rows.values())

    def accept_drafts(self, requests: Sequence[Request], rows: Sequence[int]) -> list[int]:
        """Compare the token that each request has just got with its next draft.

        Args:
            requests: requests that got a token.
            rows: row of logits of each token.

        Returns:
            Indices of the requests that get the token of the next row too.
        """
        running = []
        for index, (request, row) in enumerate(zip(requests, rows, strict=True)):
            # a request gets the tokens of further rows while its drafts are accepted
            drafts, depth = self.drafts_of(request), self.num_accepted[request]
            is_left_out = request.finish_reason == "error" or request in self.late
            if is_left_out or depth >= len(drafts):
                continue
            if self.token_ids is None:
                is_accepted = drafts.tokens[depth] == request.token_ids[-1]
            else:
                is_accepted = bool(self.token_ids[row + 1] != REJECTED)
            self.num_accepted[request] += is_accepted
            if is_accepted and request.finish_reason is None:
                # the draft is computed, unless the request was preempted since
                request.num_computed_tokens += request.batch_row >= 0
                running.append(index)
        return running

    def drafts_of(self, request: Request) -> Drafts:
        """Return the drafts of a request, which may be none."""
        return self.drafts.get(request, NO_DRAFTS)

    def num_rejected(self, request: Request) -> int:
        """Return the number of drafts of a request that were rejected."""
        num_drafts = len(self.drafts_of(request))
        return num_drafts - self.num_accepted.get(request, num_drafts)

    def record_latencies(self, metrics: EngineMetrics, now: float) -> None:
        """Record the latency of the tokens that the step has given.

        All decoding requests got their token at the end of the step before, so one interval counts
        for all of them.

        Args:
            metrics: histograms of the latencies.
            now: time at which the host has the tokens, seconds of time.monotonic().
        """
        if num_decoding := len(self.sampling) - len(self.prefilled):
            interval = now - metrics.last_step_time
            metrics.inter_token_latency.observe(interval, num_decoding)
        for request in self.prefilled:
            # after a preemption, the token at the end of a prompt is not the first one
            if request.preempted_time is not None and len(request.output_token_ids) > 1:
                metrics.inter_token_latency.observe(now - request.preempted_time)
            elif (first := request.state.first_token_time) is not None:
                metrics.time_to_first_token.observe(first - request.state.arrival_time)
        metrics.last_step_time = now

    def postpone(self, request: Request) -> None:
        """Give a request no token, so that a later step computes its last token again."""
        self.late.add(request)
        request.forget_pending()

    def receivers(
        self, requests: Sequence[Request], drop: Callable[[Request], object]
    ) -> list[int]:
        """Return the indices of the requests that get a token.

        The other requests have ended since the step was enqueued, or their masks are late.

        Args:
            requests: requests of `sampling`.
            drop: called with each request whose grammar was complete with the token before, if the
                worker of the grammar answered late.
        """
        found = []
        for index, request in enumerate(requests):
            if request.finish_reason is not None or request in self.late:
                continue
            if request.grammar is not None:
                if self.token_ids is None and not request.grammar.await_mask():
                    self.postpone(request)
                    continue
                if request.grammar.is_finished:
                    request.end("stop")
                    drop(request)
                    continue
            found.append(index)
        return found

    def score_prompts(self) -> list[Request]:
        """Score prompt tokens by their rows of logits, and cut `logits` to those of `sampling`.

        Returns:
            Requests whose logits are unusable.
        """
        assert self.logits is not None, "the host scores prompts"
        begin = self.logits_indptr[-1]
        logits, self.logits = self.logits, self.logits[:begin]
        failed = []
        for request, count in self.scoring:
            scores = request.prompt_logprobs
            if scores is not None and not scores.append(logits[begin : begin + count]):
                failed.append(request)
            begin += count
        return failed


def offer_tokens(requests: Sequence[Request], token_ids: Sequence[int]) -> None:
    """Send sampled tokens to the workers of grammars, all workers at the same time.

    Args:
        requests: requests that get a token.
        token_ids: token of each request, or a negative result code.
    """
    grammars = []
    for request, token_id in zip(requests, token_ids, strict=True):
        if request.grammar is not None and token_id >= 0:
            request.grammar.offer(token_id)
            grammars.append(request.grammar)
    for grammar in grammars:
        grammar.send()
