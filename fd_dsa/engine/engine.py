"""Engine: schedules requests, runs one step at a time, and returns tokens and text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fd_dsa.engine.batch import ScheduledBatch, offer_tokens
from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.metrics import EngineMetrics, EngineStats
from fd_dsa.engine.output import FinishReason, RequestOutput
from fd_dsa.engine.request import Request, new_group
from fd_dsa.engine.sampler import StepSampler
from fd_dsa.engine.sampling_params import RequestLimits, SamplingParams
from fd_dsa.engine.scheduler import Scheduler
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.engine.step_times import StepTable
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import is_out_of_memory
from fd_dsa.ops.sampling.token_buffer import NOT_FINITE
from fd_dsa.runner.protocol import Runner

Before = ScheduledBatch | None


class LLMEngine:
    """Continuous batching over one runner, for one thread.

    Each `step` schedules a batch of tokens, executes it, and processes the results of the batch
    before it or of its own; see `_finish_step`.

    Args:
        runner: runs the model on the step in its `input_batch`, whose sizes bound a step.
        max_model_len: maximum number of tokens of prompt and output.
        eos_token_ids: tokens that end an output.
        target_gap_s: target inter-token latency that limits prefill chunks, seconds; 0 = off.
        enable_prefix_caching: True if requests share the blocks of prompts that begin alike.
        seed: seed of requests that have none.
        sampling_defaults: defaults of SamplingParams that only callers apply.
        async_scheduling: True if a step may be enqueued before the host has the tokens of the step
            before. It needs sampling on the device, and drafts that do not depend on them.
        spec_decoder: decides on drafts; None = no drafts.
        step_table: see Scheduler.

    Attributes:
        clock: times steps, seconds.
        limits: bounds of what requests may ask for.
        grammars: compiles the grammars of outputs.
        metrics: counts and times of requests.
        block_manager: owner of the cache blocks.
        scheduler: chooses the requests and tokens of a step.
        in_flight: enqueued step whose tokens the host has not read, or None.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        target_gap_s: float = 0.0,
        enable_prefix_caching: bool = True,
        seed: int = 0,
        sampling_defaults: Mapping[str, float | int] | None = None,
        async_scheduling: bool = True,
        spec_decoder: SpecDecoder | None = None,
        step_table: StepTable | None = None,
    ) -> None:
        self.runner, self.tokenizer, self._seed = runner, tokenizer, seed
        # load it now, not in the step of the first request
        tokenizer.text_token_bytes()
        self.clock: Callable[[], float] = time.perf_counter
        self.sampling_defaults: dict[str, Any] = dict(sampling_defaults or {})
        self._input_batch = runner.input_batch
        block_size, num_rows = self._input_batch.block_size, self._input_batch.max_num_seqs
        self._stats = EngineStats(num_blocks=num_blocks)
        self.block_manager = BlockManager(num_blocks, block_size, enable_prefix_caching)
        sizes = runner.vocab_size, max_model_len, num_blocks, block_size
        self.limits = RequestLimits(*sizes, runner.info.selections is not None)
        self._eos_token_ids = end_ids = frozenset(eos_token_ids)
        self.grammars = GrammarCompiler(tokenizer, runner.vocab_size, end_ids, is_patient=False)
        lookahead = int(spec_decoder is not None and spec_decoder.drafter.is_layer)
        parts = self.block_manager, self._input_batch, self._stats
        self.scheduler = Scheduler(*parts, target_gap_s, lookahead, step_table)
        self._sampler = StepSampler(runner, num_rows)
        self._is_async, self.spec_decoder = async_scheduling, spec_decoder
        self.in_flight: ScheduledBatch | None = None
        # unfinished requests by the caller's id
        self._requests: dict[str, list[Request]] = {}
        self.metrics = EngineMetrics(max_model_len, runner.info.counters)
        self.metrics.cache_config.update(
            block_size=str(block_size),
            num_gpu_blocks=str(num_blocks),
            enable_prefix_caching=str(enable_prefix_caching),
        )
        self._num_arrived, self._last_end = 0, 0.0
        # True once a request has asked for the selected keys
        self._wants_selections = False

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Return the maximum number of output tokens of a request. Thread-safe.

        The call compiles the grammar, which may take half a second, so other threads make it.

        Raises:
            ValueError: the request can never run; see `RequestLimits.validate` and
                `GrammarCompiler.check`.
        """
        max_tokens, _ = self.limits.validate(prompt_token_ids, params)
        if params.structured_outputs is not None:
            self.grammars.check(params)
        return max_tokens

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int] | np.ndarray, params: SamplingParams
    ) -> None:
        """Queue a request with `params.n` outputs, which `RequestOutput.index` numbers.

        A grammar that `validate` refuses ends the request with an error.

        Raises:
            ValueError: see `validate`, or an unfinished request has the same id.
        """
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use; choose another one")
        max_tokens, prompt = self.limits.validate(prompt_token_ids, params)
        group = new_group(
            request_id,
            prompt,
            params,
            max_tokens=max_tokens,
            eos_token_ids=self._eos_token_ids,
            first_seq_id=self._num_arrived,
            seed=self._seed,
            block_size=self._input_batch.block_size,
            tokenizer=self.tokenizer,
            grammars=self.grammars,
        )
        self._num_arrived += params.n
        self._stats.prompt_tokens += len(prompt)
        self._wants_selections |= params.return_topk_positions
        self._requests[request_id] = list(group)
        for request in group:
            self.scheduler.add(request)
        if self.spec_decoder is not None:
            self.spec_decoder.new_requests += group

    def abort_request(self, request_id: str) -> list[RequestOutput]:
        """End a request now, and return the last state of its unfinished outputs."""
        return [self._end(r, "abort") for r in list(self._requests.get(request_id, ()))]

    def abort_all(self) -> list[RequestOutput]:
        """End all requests now, and return the last state of their unfinished outputs."""
        return [output for name in list(self._requests) for output in self.abort_request(name)]

    def finish_output(self, request_id: str, index: int) -> list[RequestOutput]:
        """End one output of a request as if the model had, and return its last state if it ran."""
        unfinished = self._requests.get(request_id, ())
        return [self._end(r, "stop") for r in list(unfinished) if r.state.index == index]

    def has_unfinished_requests(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Run one step, and return outputs of the requests that got a token or ended.

        After an out-of-memory error the next steps need less memory (`shrink_after_oom`).

        Raises:
            Exception: any other error of the runner. Requests get no token then, and a later call
                runs the step again.
        """
        ended = [self._end(request, reason) for request, reason in self.scheduler.settled()]
        if not self._requests:
            # the step in flight was for requests that have ended
            self.in_flight = None
            return ended
        before, begin, runner_time_s = self.in_flight, self.clock(), self._stats.runner_time_s
        batch = self._schedule(may_be_idle=before is not None)
        try:
            if batch is not None:
                self._execute_batch(batch)
        except Exception as error:
            if batch is None or not is_out_of_memory(error):
                raise
            too_large = self.scheduler.shrink_after_oom(batch, error)
            failure = RuntimeError("there is no memory for a step of this request alone")
            return ended + ([self._end(too_large, "error", failure)] if too_large else [])
        self.in_flight = None
        try:
            outputs = self._finish_step(before, batch)
        except Exception:
            self._forget(before, batch)
            raise
        in_runner_s = self._stats.runner_time_s - runner_time_s
        self._stats.host_time_s += self.clock() - begin - in_runner_s
        return ended + outputs

    def _schedule(self, may_be_idle: bool) -> ScheduledBatch | None:
        """Choose the requests of the next step.

        Returns:
            The step; None if it may be idle, or if it has waited for a grammar.
        """
        scheduler, spec_decoder = self.scheduler, self.spec_decoder
        if spec_decoder is not None:
            num_requests = scheduler.num_running + scheduler.num_waiting
            spec_decoder.admit(min(num_requests, self._input_batch.max_num_seqs))
        batch = scheduler.schedule()
        if batch is None and not may_be_idle:
            if not self.grammars.wait():
                raise RuntimeError(f"nothing to run for {len(self._requests)} requests: a defect")
            batch = scheduler.schedule()
        return batch

    def _execute_batch(self, batch: ScheduledBatch) -> None:
        """Enqueue a step if the device samples, else run it and wait for its logits."""
        batch.fill(self._input_batch)
        batch.ready_time = self.clock()
        self._sampler.execute(self.runner, batch, self._wants_selections)
        self._stats.runner_time_s += self.clock() - batch.ready_time
        self.scheduler.complete_step(batch)

    # The host chooses one of three modes after it has enqueued a step:
    #
    # synchronous  host    | schedule k | enqueue k | wait for k ........ | process k |
    #              device               | forward k, sample k ........... |
    #
    # overlapped   host    | schedule k+1 | enqueue k+1 | wait for k | process k | schedule k+2 |
    #              device  | forward k, sample k .................. | forward k+1, sample k+1 ...
    #
    # late masks   host    | schedule k+1 | enqueue k+1 | wait for k | process k | masks k+1 | ...
    #              device  | forward k, sample k .................. | forward k+1 .. | sample k+1

    def _finish_step(self, before: Before, batch: ScheduledBatch | None) -> list[RequestOutput]:
        """Choose the mode of a call after the step is enqueued, if there is one.

        The step is synchronous if the host samples, or if drafts or the caller need its tokens.
        """
        if batch is None:
            return self._process(before)
        self._stats.num_mask_waits += before is not None and batch.has_late_masks
        needs_tokens = self.spec_decoder is not None and self.spec_decoder.needs_sync
        if batch.sampling_inputs is None or needs_tokens or not self._is_async:
            return self._synchronous(before, batch)
        run = self._late_masks if batch.has_late_masks else self._overlapped
        return run(before, batch)

    def _synchronous(self, before: Before, batch: ScheduledBatch) -> list[RequestOutput]:
        """Process the step before, then wait for this one and process it too."""
        outputs = self._process(before)
        if batch.has_late_masks:
            self._sampler.enqueue_late_samples(batch)
        return outputs + self._process(batch)

    def _overlapped(self, before: Before, batch: ScheduledBatch) -> list[RequestOutput]:
        """Process the step before while the device runs this one."""
        outputs = self._process(before)
        self._keep_in_flight(batch)
        return outputs

    def _late_masks(self, before: Before, batch: ScheduledBatch) -> list[RequestOutput]:
        """Process the step before while the device computes the logits of this one."""
        outputs = self._process(before)
        self._sampler.enqueue_late_samples(batch)
        self._keep_in_flight(batch)
        return outputs

    def _keep_in_flight(self, batch: ScheduledBatch) -> None:
        """Leave the tokens of a step to the next call, which schedules without them."""
        self.in_flight = batch
        batch.advance_optimistically()
        if self.spec_decoder is not None:
            self.scheduler.proposals = self.spec_decoder.propose(batch)

    def _forget(self, *batches: ScheduledBatch | None) -> None:
        """Drop steps whose tokens will not come, so that requests compute them again."""
        self._sampler.invalidate()
        self.scheduler.proposals = {}
        for batch in batches:
            for request in batch.sampling if batch is not None else ():
                request.forget_pending()

    def _process(self, batch: ScheduledBatch | None) -> list[RequestOutput]:
        """Wait for the tokens of a step, and give them to its requests."""
        if batch is None:
            return []
        stats, shape, begin = self._stats, batch.shape, self.clock()
        if batch.future is not None:
            batch.token_ids = batch.future.result()
        stats.runner_time_s += self.clock() - begin
        outputs: list[RequestOutput] = []
        if batch.scoring:
            outputs = [self._fail(request, NOT_FINITE) for request in batch.score_prompts()]
        alive = [request for request in batch.sampling if request.finish_reason is None]
        outputs += self._append_all(batch)
        outputs += [
            request.output()
            for request in alive
            if request.finish_reason != "error" and request not in batch.late
        ]
        if self.spec_decoder is not None and not batch.is_in_flight:
            self.scheduler.proposals = self.spec_decoder.propose(batch)
        batch.record_latencies(self.metrics, time.monotonic())
        stats.num_steps += 1
        stats.computed_prompt_tokens += shape.num_prefill_tokens
        # the token of a decoding request comes after the one of the step before; without such
        # requests, a step may have waited for a grammar before it was ready
        since, end = self._last_end if shape.num_decode_tokens else batch.ready_time, self.clock()
        self.scheduler.record_step_time(batch, end - since)
        self._last_end = end
        return outputs

    def _append_all(self, batch: ScheduledBatch) -> list[RequestOutput]:
        """Give each request of a step its token and its accepted drafts, as `_append` does."""
        if self.spec_decoder is None or not batch.drafts:
            return self._append(batch, batch.sampling, range(len(batch.sampling)))
        outputs, (requests, rows) = list[RequestOutput](), batch.begin_verification()
        while requests:
            outputs += self._append(batch, requests, rows)
            accepted = batch.accept_drafts(requests, rows)
            requests = [requests[index] for index in accepted]
            rows = [rows[index] + 1 for index in accepted]
            for request in requests:
                self.scheduler.handle_new_token(request)
        self.spec_decoder.record_acceptance(batch, self._stats)
        return outputs

    def stats(self) -> EngineStats:
        """Return the counters, and the present load."""
        num_used, tier = self.block_manager.num_used, self.block_manager.tier
        return replace(
            self._stats,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_used_blocks=num_used,
            kv_cache_usage=num_used / self.block_manager.num_blocks,
            host_cache_usage=tier.usage if tier is not None else 0.0,
        )

    def _append(
        self, batch: ScheduledBatch, requests: list[Request], rows: Sequence[int]
    ) -> list[RequestOutput]:
        """Give each request the token of its row of logits.

        Returns:
            Outputs of requests that cannot have a token.
        """
        alive = batch.receivers(requests, self._drop)
        if not alive:
            return []
        if len(alive) < len(requests):
            requests, rows = [requests[i] for i in alive], [rows[i] for i in alive]
        token_ids, scores = self._sampler.tokens(batch, requests, rows)
        now, outputs = time.monotonic(), []
        offer_tokens(requests, token_ids)
        for request, token_id, score in zip(requests, token_ids, scores, strict=True):
            request.pending_row = -1
            if token_id < 0:
                outputs.append(self._fail(request, token_id))
                continue
            request.append_token(token_id, now, score)
            self._stats.generated_tokens += 1
            if request.finish_reason is not None:
                self._drop(request)
            else:
                self.scheduler.handle_new_token(request)
        return outputs

    def _end(
        self, request: Request, reason: FinishReason, error: RuntimeError | None = None
    ) -> RequestOutput:
        """End a request without a next token."""
        request.end(reason)
        self._drop(request)
        return request.output(error)

    def _fail(self, request: Request, code: int) -> RequestOutput:
        """End a request that cannot have a next token."""
        # the step may have written unusable keys, which other requests may have read
        if code == NOT_FINITE:
            self.block_manager.reset_prefix_cache()
        return self._end(request, "error", request.failure(code))

    def _drop(self, request: Request) -> None:
        """Count an ended request, and free its row and blocks."""
        request.record_end(self.metrics)
        self.scheduler.finish(request)
        request_id = request.state.request_id
        self._requests[request_id].remove(request)
        if not self._requests[request_id]:
            del self._requests[request_id]
