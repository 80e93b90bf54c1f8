"""The engine: requests in, one step of the runner at a time, tokens and text out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.grammar import GrammarCompiler, form_of
from fd_dsa.engine.launched_step import LaunchedStep, assemble, execute_watched, offer_tokens
from fd_dsa.engine.limits import RequestLimits
from fd_dsa.engine.logit_rules import BadWords
from fd_dsa.engine.logprobs import TokenScore
from fd_dsa.engine.metrics import EngineMetrics, EngineStats
from fd_dsa.engine.output import ConstraintError, FinishReason, OutputState, RequestOutput
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampler import derive_seed
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.scheduler import Scheduler
from fd_dsa.engine.speculation import Speculator
from fd_dsa.engine.step_sampler import StepSampler
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import is_out_of_memory
from fd_dsa.ops.sampling.token_buffer import NOT_FINITE
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.runner.protocol import Runner


class LLMEngine:
    """Continuous batching over one runner; not thread-safe.

    Args:
        runner: runs the model on the step in its `input_batch`, whose sizes bound a step.
        max_model_len: longest prompt plus output, tokens.
        eos_token_ids: tokens that end an output.
        target_gap_s: seconds between two tokens of a request, which prompts computed in the same
            steps shall not exceed; 0 = no target.
        enable_prefix_caching: whether requests share the blocks of prompts that begin alike.
        seed: of requests that bring none.
        sampling_defaults: fields of SamplingParams that the model proposes to callers who leave
            them out; the engine itself does not apply them.
        async_scheduling: whether a step is queued before the tokens of the one before have come,
            where they are drawn on a device and lead to no draft of a drafter that reads them.
        speculator: has drafts made and verifies them; None = no drafts.

    Attributes:
        clock: seconds; what steps are measured with.
        limits: what requests may ask for.
        grammars: compiles the forms of outputs.
        metrics: counts and times of requests.
        block_manager: owner of the cache blocks.
        scheduler: order of the requests, and the rows and tokens of a step.
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
        speculator: Speculator | None = None,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        # made now, not in the first request's step
        tokenizer.text_token_bytes()
        self.clock: Callable[[], float] = time.perf_counter
        self.sampling_defaults: dict[str, Any] = dict(sampling_defaults or {})
        self._batch: InputBatch = runner.input_batch
        block_size, num_rows = self._batch.block_size, self._batch.max_num_seqs
        self._stats = EngineStats(num_blocks=num_blocks)
        self.block_manager = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.limits = RequestLimits(
            runner.vocab_size,
            max_model_len,
            num_blocks,
            block_size,
            runner.info.selections is not None,
        )
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = seed
        self.grammars = GrammarCompiler(
            tokenizer, runner.vocab_size, self._eos_token_ids, is_patient=False
        )
        lookahead = int(speculator is not None and speculator.drafter.is_layer)
        parts = self.block_manager, self._batch, self._stats
        self.scheduler = Scheduler(*parts, target_gap_s, lookahead)
        self._sampler = StepSampler(runner, num_rows)
        self._is_async, self.speculator = async_scheduling, speculator
        self.in_flight: LaunchedStep | None = None
        # what is left of each group
        self._requests: dict[str, list[Request]] = {}
        self.metrics = EngineMetrics(max_model_len, runner.info.counters)
        self.metrics.cache_config.update(
            block_size=str(block_size),
            num_gpu_blocks=str(num_blocks),
            enable_prefix_caching=str(enable_prefix_caching),
        )
        self._num_arrived = 0
        # whether a request has asked for what the indexer chose
        self._has_watched = False
        self._last_end = 0.0

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """Rows of the decode steps that the runner replays from graphs, ascending."""
        return self.runner.info.captured_sizes

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Output tokens that a request may have; safe to call from any thread.

        A grammar is compiled here, which may take half a second: not for the engine's thread.

        Raises:
            ValueError: the request can never run; see `RequestLimits.validate` and
                `GrammarCompiler.check`.
        """
        max_tokens = self.limits.validate(prompt_token_ids, params)
        if params.structured_outputs is not None:
            self.grammars.check(params)
        return max_tokens

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Queue a request; `RequestOutput.index` distinguishes its n outputs.

        A grammar that `validate` would refuse ends the request with an error instead.

        Raises:
            ValueError: see `validate`; or an unfinished request has the same id.
        """
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use; choose another one")
        max_tokens = self.limits.validate(prompt_token_ids, params)
        arrival, end_token_ids = self._num_arrived, frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            end_token_ids |= self._eos_token_ids
        seed = derive_seed(self._seed, arrival) if params.seed is None else params.seed
        prompt, now = np.asarray(prompt_token_ids).tolist(), time.monotonic()
        bad_words = BadWords.of(params.bad_words, self.tokenizer)
        group: list[Request] = []
        for index in range(params.n):
            request = Request(
                state=OutputState(request_id, index, prompt, arrival_time=now),
                params=params,
                max_tokens=max_tokens,
                end_token_ids=end_token_ids,
                arrival=arrival + index,
                seed=derive_seed(seed, index) if index else seed,
                group=group,
                block_size=self._batch.block_size,
                tokenizer=self.tokenizer,
                grammars=self.grammars,
                bad_words=bad_words,
            )
            group.append(request)
        self._num_arrived += params.n
        self._stats.prompt_tokens += len(prompt_token_ids)
        self._has_watched |= params.return_topk_positions
        self._requests[request_id] = list(group)
        for request in group:
            self.scheduler.add(request)
        if self.speculator is not None:
            self.speculator.arrived += group

    def abort_request(self, request_id: str) -> list[RequestOutput]:
        """End a request now; the last state of every output of it that was unfinished."""
        return [self._end(r, "abort") for r in list(self._requests.get(request_id, ()))]

    def abort_all(self) -> list[RequestOutput]:
        """End all requests now; the last state of every output that was unfinished."""
        return [output for name in list(self._requests) for output in self.abort_request(name)]

    def finish_output(self, request_id: str, index: int) -> list[RequestOutput]:
        """End one of a request's n outputs now, as if the model had; its last state, if it ran."""
        unfinished = self._requests.get(request_id, ())
        return [self._end(r, "stop") for r in list(unfinished) if r.state.index == index]

    def has_unfinished_requests(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Run one step; outputs of the requests that got a token or ended.

        Where tokens are drawn on a device, the step is queued and those of the step before are
        taken while it runs. A request that they end may have a row in it, whose token is dropped.
        If a row's mask depends on them, as a grammar's does, the draw is queued after that.

        After a step that finds no memory the next ones need less (`Scheduler.relieve`).

        Raises:
            Exception: what else the runner raises; no request has got a token then, and a later
                call runs the step again.
        """
        ended = [self._end(request, reason) for request, reason in self.scheduler.settled()]
        if not self._requests:
            # what is in flight was for requests that have ended
            self.in_flight = None
            return ended
        begin, runner_time_s = self.clock(), self._stats.runner_time_s
        before = self.in_flight
        try:
            launched = self._launch(may_be_idle=before is not None)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            too_large = self.scheduler.relieve(error)
            failure = RuntimeError("there is no memory for a step of this request alone")
            return ended + ([self._end(too_large, "error", failure)] if too_large else [])
        self.in_flight = None
        try:
            outputs = [] if before is None else self._take(before)
            if launched is not None and launched.places is not None and launched.draw is None:
                # its masks are known after the tokens of the step before
                self._stats.num_mask_waits += before is not None
                self._sampler.draw(launched)
            waits = self.speculator is not None and self.speculator.waits
            if launched is not None and (waits or not (self._is_async and launched.draw)):
                outputs += self._take(launched)
                launched = None
        except Exception:
            self._sampler.forget()
            self.scheduler.proposals = {}
            for step in (before, launched):
                for request in step.sampling if step is not None else ():
                    request.forget_draw()
            raise
        if launched is not None:
            self.in_flight = launched
            launched.count_ahead()
            if self.speculator is not None:
                self.scheduler.proposals = self.speculator.propose(launched)
        in_runner_s = self._stats.runner_time_s - runner_time_s
        self._stats.host_time_s += self.clock() - begin - in_runner_s
        return ended + outputs

    def _launch(self, may_be_idle: bool) -> LaunchedStep | None:
        """Queue a step; None if nothing runs: it may be idle, or it has waited for a grammar.

        A step of which the host needs logits is waited for.
        """
        scheduler, speculator = self.scheduler, self.speculator
        if speculator is not None:
            num_requests = scheduler.num_running + scheduler.num_waiting
            speculator.begin(min(num_requests, self._batch.max_num_seqs))
        scheduled = scheduler.schedule()
        is_waiting = not scheduled and not may_be_idle and self.grammars.wait()
        if is_waiting:
            scheduled = scheduler.schedule()
        if not scheduled:
            if may_be_idle or is_waiting:
                return None
            count = len(self._requests)
            raise RuntimeError(f"nothing to run with {count} requests: a defect of the engine")
        sampling, reading, logits_indices = assemble(self._batch, scheduled, scheduler.drafts)
        num_prefill_tokens = self._batch.num_prefill_tokens
        step = LaunchedStep(
            ready=self.clock(),
            sampling=sampling,
            reading=reading,
            resumed=[r for r in sampling if not r.is_decode] if num_prefill_tokens else [],
            num_decode_tokens=self._batch.num_tokens - num_prefill_tokens,
            num_prefill_tokens=num_prefill_tokens,
            prefill_context=scheduler.prefill_context,
            scheduled=scheduled,
            drafts=scheduler.drafts,
        )
        if self._has_watched:
            step.logits = execute_watched(self.runner, step, logits_indices)
        elif not self._sampler.queue(step, logits_indices):
            step.logits = self.runner.execute_model(logits_indices)
            self._sampler.read_drafts(step)
        self._stats.runner_time_s += self.clock() - step.ready
        scheduler.complete_step()
        return step

    def _take(self, step: LaunchedStep) -> list[RequestOutput]:
        """Give the requests of a launched step their tokens; waits for it."""
        stats, tokens, begin = self._stats, None, self.clock()
        if step.draw is not None:
            tokens = step.draw()
        stats.runner_time_s += self.clock() - begin
        outputs: list[RequestOutput] = []
        if step.reading:
            outputs = [self._fail(request, NOT_FINITE) for request in step.read_prompts()]
        alive = [request for request in step.sampling if request.finish_reason is None]
        if step.drafts and self.speculator is not None:
            outputs += self.speculator.verify(step, self._append, self.scheduler, stats, tokens)
        elif step.sampling:
            outputs += self._append(step, step.sampling, step.logits, tokens)
        outputs += [
            request.output()
            for request in alive
            if request.finish_reason != "error" and request not in step.late
        ]
        if self.speculator is not None and not step.is_in_flight:
            self.scheduler.proposals = self.speculator.propose(step)
        self.metrics.count_step(len(step.sampling) - len(step.resumed), step.resumed)
        stats.num_steps += 1
        stats.computed_prompt_tokens += step.num_prefill_tokens
        # the token of a decoding request comes after the one of the step before; without such
        # requests, a step may have waited for a grammar before it was ready
        since, end = self._last_end if step.num_decode_tokens else step.ready, self.clock()
        self.scheduler.observe(step, end - since)
        self._last_end = end
        return outputs

    def stats(self) -> EngineStats:
        """Counters and load now."""
        num_used = self.block_manager.num_used
        return replace(
            self._stats,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_used_blocks=num_used,
            kv_cache_usage=num_used / self.block_manager.num_blocks,
        )

    def _append(
        self,
        step: LaunchedStep,
        sampling: list[Request],
        logits: npt.NDArray[np.float32],
        tokens: npt.NDArray[np.int64] | None,
    ) -> list[RequestOutput]:
        """Give each request its next token, drawn or sampled here; outputs of those without one."""
        alive = step.going_on(sampling, tokens is None, self._drop)
        if not alive:
            return []
        if len(alive) < len(sampling):
            sampling = [sampling[row] for row in alive]
            logits = None if logits is None else logits[alive]
            tokens = None if tokens is None else tokens[alive]
        scores: list[TokenScore | None] = [None] * len(sampling)
        if tokens is None:
            tokens, scores = self._sampler.sample(sampling, logits)
        now = time.monotonic()
        outputs = []
        token_ids = tokens.tolist()
        offer_tokens(sampling, token_ids)
        for request, token_id, score in zip(sampling, token_ids, scores, strict=True):
            request.pending_row = -1
            if token_id < 0:
                outputs.append(self._fail(request, token_id))
                continue
            request.append_token(token_id, now, score)
            self._stats.generated_tokens += 1
            if request.finish_reason is not None:
                self._drop(request)
            else:
                self.scheduler.take_token(request)
        return outputs

    def _end(
        self, request: Request, reason: FinishReason, error: RuntimeError | None = None
    ) -> RequestOutput:
        """End a request without a next token."""
        request.end(reason)
        self._drop(request)
        return request.output(error)

    def _fail(self, request: Request, code: int) -> RequestOutput:
        """End a request whose next token cannot be; the others go on."""
        what = f"output token {len(request.output_token_ids)}"
        reason = "bad_words, min_tokens and the like leave no token that may come; ask for less"
        if request.grammar is not None:
            field = form_of(request.params).source
            reason = f"{request.grammar.error or reason}; so {field} cannot be followed"
        error: RuntimeError = ConstraintError(f"{what}: {reason}")
        if code == NOT_FINITE:
            # what it wrote into the caches may be unusable too, and others may have read it already
            self.block_manager.reset_prefix_cache()
            error = RuntimeError(
                f"{what}: the logits are not finite; the model or its weights are at fault"
            )
        return self._end(request, "error", error)

    def _drop(self, request: Request) -> None:
        """Count an ended request and free what it holds."""
        self.metrics.count_end(request)
        self.scheduler.finish(request)
        request_id = request.state.request_id
        self._requests[request_id].remove(request)
        if not self._requests[request_id]:
            del self._requests[request_id]
