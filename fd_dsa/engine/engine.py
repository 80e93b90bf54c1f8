"""The engine: requests in, one step of the runner at a time, tokens and text out."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.detokenizer import IncrementalDetokenizer, StopChecker
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.random_uniform import derive_seed
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampler import NOT_FINITE, Sampler
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.scheduler import BlockTables, Scheduler
from fd_dsa.engine.tokenizer import Tokenizer


class StepRows(BlockTables, Protocol):
    """The input batch of a runner: what the engine writes before a step."""

    def begin_step(self) -> None:
        """Make every row idle; block tables stay."""

    def add_row(
        self, row: int, token_ids: Sequence[int], num_computed_tokens: int, is_prefill: bool
    ) -> int:
        """Flat index of the row's last token; rows come in ascending order."""


class RunnerProtocol(Protocol):
    """What the engine asks of a runner."""

    input_batch: Any  # a StepRows; Any lets a runner declare its own class
    vocab_size: int

    def execute_model(self, logits_indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits float32 [n, vocab_size] of n flat token rows of the step just assembled."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and the present load.

    Attributes:
        kv_cache_usage: share of the cache blocks in use, 0 to 1; blocks that are only kept for
            later requests are not in use.
        prefix_cache_queries: prompt tokens looked for in the prefix cache, each request counted
            when it first runs.
        prefix_cache_hits: those of them that were there.
        host_time_s, runner_time_s: seconds spent in steps, outside and inside the runner.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_used_blocks: int
    kv_cache_usage: float
    num_steps: int
    num_preemptions: int
    prompt_tokens: int
    generated_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    host_time_s: float
    runner_time_s: float


class LLMEngine:
    """Continuous batching over one runner; not thread-safe.

    Args:
        runner: runs the model on the step assembled in its input batch.
        tokenizer: for the text of outputs.
        num_blocks: blocks of the caches.
        block_size: tokens per block.
        max_model_len: longest prompt plus output, tokens.
        max_num_seqs: rows of a step.
        max_num_batched_tokens: tokens of a step.
        eos_token_ids: tokens that end an output.
        enable_prefix_caching: whether requests share the blocks of prompts that begin alike.
        seed: of requests that bring none.
        sampling_defaults: fields of SamplingParams that the model proposes to callers who leave
            them out; the engine itself does not apply them.
    """

    def __init__(
        self,
        runner: RunnerProtocol,
        tokenizer: Tokenizer,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: Iterable[int],
        enable_prefix_caching: bool = True,
        seed: int = 0,
        sampling_defaults: Mapping[str, float | int] | None = None,
    ) -> None:
        """Start without requests."""
        for name, value in {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
        }.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be >= 1")
        self.runner = runner
        self.tokenizer = tokenizer
        # made now, not in the first request's step
        _ = tokenizer.text_token_bytes
        self.max_model_len = max_model_len
        self.sampling_defaults: dict[str, Any] = dict(sampling_defaults or {})
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = seed
        self._batch: StepRows = runner.input_batch
        self._blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self._scheduler = Scheduler(self._blocks, self._batch, max_num_seqs, max_num_batched_tokens)
        self._sampler = Sampler(max_num_seqs)
        # arrival number of the request whose parameters the sampler has in a slot
        self._slot_params = [-1] * max_num_seqs
        self._requests: dict[str, Request] = {}
        self._num_arrived = 0
        self._num_steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._host_time_s = 0.0
        self._runner_time_s = 0.0

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Output tokens that a request may have; safe to call from any thread.

        Raises:
            ValueError: the prompt is empty or holds no valid token ids, or the request can never
                fit into the context or the cache; names the numbers.
        """
        num_prompt = len(prompt_token_ids)
        if num_prompt == 0:
            raise ValueError("the prompt has no tokens; it must have at least 1")
        if num_prompt >= self.max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, max_model_len is {self.max_model_len} and "
                "the output needs at least 1; shorten the prompt or raise max_model_len"
            )
        self._check_token_ids(prompt_token_ids)
        room = self.max_model_len - num_prompt
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if max_tokens > room:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together "
                f"{num_prompt + max_tokens}; max_model_len is {self.max_model_len}; lower "
                "max_tokens, shorten the prompt or raise max_model_len"
            )
        # the last token is never fed back, so it needs no place in the cache
        needed = self._blocks.num_needed(num_prompt + max_tokens - 1)
        if needed > self._blocks.num_blocks:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and up to {max_tokens} follow, which need "
                f"{needed} cache blocks of {self._blocks.block_size} tokens; there are "
                f"{self._blocks.num_blocks}; lower max_tokens or give the cache more memory"
            )
        return max_tokens

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Queue a request.

        Raises:
            ValueError: see `validate`; or an unfinished request has the same id.
        """
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use; choose another one")
        max_tokens = self.validate(prompt_token_ids, params)
        prompt = [operator.index(token_id) for token_id in prompt_token_ids]
        arrival = self._num_arrived
        seed = derive_seed(self._seed, arrival) if params.seed is None else params.seed
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=params,
            max_tokens=max_tokens,
            arrival=arrival,
            arrival_time=time.monotonic(),
            seed=seed,
            detokenizer=IncrementalDetokenizer(self.tokenizer, prompt_token_ids=prompt),
            stop_checker=StopChecker(params.stop_strings) if params.stop_strings else None,
            block_size=self._blocks.block_size,
        )
        self._num_arrived += 1
        self._prompt_tokens += len(prompt)
        self._requests[request_id] = request
        self._scheduler.add(request)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Last output of a request, which is ended now; None when no such request is unfinished."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        now = time.monotonic()
        request.finish("abort", now)
        output = request.output([], request.take_text("", now))
        self._drop(request)
        return output

    def has_unfinished_requests(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Run one step; outputs of the requests that got a token or ended.

        Raises:
            Exception: whatever the runner raises; no request has got a token then, and a later
                call runs the step again.
        """
        if not self._requests:
            return []
        begin = time.perf_counter()
        scheduled = self._scheduler.schedule()
        if not scheduled:
            raise RuntimeError(
                f"the scheduler found nothing to run with {len(self._requests)} unfinished "
                "requests; this is a defect of the engine"
            )
        sampling, logits_indices = self._assemble(scheduled)
        ready = time.perf_counter()
        logits = self.runner.execute_model(logits_indices)
        done = time.perf_counter()
        self._scheduler.complete_step()
        outputs = self._sample(sampling, logits) if sampling else []
        self._num_steps += 1
        self._runner_time_s += done - ready
        self._host_time_s += time.perf_counter() - done + ready - begin
        return outputs

    def stats(self) -> EngineStats:
        """Counters and load now."""
        blocks = self._blocks
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks=blocks.num_blocks,
            num_used_blocks=blocks.num_used,
            kv_cache_usage=blocks.num_used / blocks.num_blocks,
            num_steps=self._num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_cache_queries=self._scheduler.prefix_cache_queries,
            prefix_cache_hits=self._scheduler.prefix_cache_hits,
            host_time_s=self._host_time_s,
            runner_time_s=self._runner_time_s,
        )

    def _check_token_ids(self, token_ids: Sequence[int]) -> None:
        """ValueError unless all are integers inside the vocabulary."""
        vocab_size = self.runner.vocab_size
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"the prompt has elements of type {ids.dtype}; it must be a flat list of integers"
            )
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(outside):
            raise ValueError(
                f"token {outside[0]} of the prompt is {ids[outside[0]]}; token ids of this model "
                f"are 0 to {vocab_size - 1}"
            )

    def _assemble(self, scheduled: list[Request]) -> tuple[list[Request], npt.NDArray[np.int64]]:
        """Fill the input batch; the requests that sample, and the flat rows of their logits."""
        batch = self._batch
        batch.begin_step()
        sampling = []
        indices = []
        for request in scheduled:
            begin = request.num_computed_tokens
            end = begin + request.num_scheduled_tokens
            last = batch.add_row(
                request.slot, request.token_ids[begin:end], begin, not request.is_decode
            )
            if end == len(request.token_ids):
                sampling.append(request)
                indices.append(last)
        return sampling, np.array(indices, np.int64)

    def _sample(
        self, sampling: list[Request], logits: npt.NDArray[np.float32]
    ) -> list[RequestOutput]:
        """Give each request its next token."""
        slots = np.array([request.slot for request in sampling], np.int64)
        positions = np.array([len(request.output_token_ids) for request in sampling], np.int64)
        for request in sampling:
            if self._slot_params[request.slot] != request.arrival:
                self._slot_params[request.slot] = request.arrival
                self._sampler.set_slot(request.slot, request.params, request.seed)
        token_ids = self._sampler.sample(logits, slots, positions).tolist()
        now = time.monotonic()
        outputs = []
        for request, token_id in zip(sampling, token_ids, strict=True):
            if token_id == NOT_FINITE:
                outputs.append(self._fail(request, now))
                continue
            text = request.append_token(token_id, self._eos_token_ids, now)
            outputs.append(request.output([token_id], text))
            self._generated_tokens += 1
            if request.finish_reason is not None:
                self._drop(request)
        return outputs

    def _fail(self, request: Request, now: float) -> RequestOutput:
        """End a request whose logits are unusable; the others go on.

        What it wrote into the caches may be unusable too, and others may have read it already.
        """
        self._blocks.reset_prefix_cache()
        error = RuntimeError(
            f"request {request.request_id!r}: the logits of output token "
            f"{len(request.output_token_ids)} are not finite; the model or its weights are at fault"
        )
        request.finish("error", now)
        output = request.output([], request.take_text("", now), error)
        self._drop(request)
        return output

    def _drop(self, request: Request) -> None:
        """Free what an ended request holds."""
        self._scheduler.finish(request)
        del self._requests[request.request_id]
