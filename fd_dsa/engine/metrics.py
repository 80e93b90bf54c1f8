"""What an engine has done and holds, for callers that watch it.

Nothing is done for each token: requests that decode have all got their token at the end of the
step before, so one interval counts for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fd_dsa.engine.request import Request
from fd_dsa.runner.counters import Histogram, StepCounters

# bounds of vLLM's histograms of the same names, so that dashboards can be used again
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


@dataclass(slots=True)
class EngineStats:
    """Counters since the start, and the present load.

    Attributes:
        kv_cache_usage: share of the cache blocks in use, 0 to 1; blocks that are only kept for
            later requests are not in use.
        prompt_tokens: of all requests that have come.
        computed_prompt_tokens: tokens that steps computed before a request's next token was due:
            prompts after their cached beginnings, and what a preempted request computes again.
        prefix_cache_queries: prompt tokens looked for in the prefix cache, each request counted
            when it first runs.
        prefix_cache_hits: those of them that were there.
        host_time_s, runner_time_s: seconds spent in steps, outside and inside the runner.
        num_mask_waits: steps on a device whose draw was queued after the tokens of the step before
            had come, as grammars and bad words of several tokens need them.
        num_drafts: times that drafts of a request were verified; `num_draft_tokens` are those
            drafts, `num_accepted_tokens` those that stood, `accepted_per_position` by place.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    host_time_s: float = 0.0
    runner_time_s: float = 0.0
    num_mask_waits: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()

    def count_drafts(self, num_drafts: int, num_accepted: int) -> None:
        """Count the drafts of a request in a step."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        counts = self.accepted_per_position
        counts += (0,) * (num_drafts - len(counts))
        self.accepted_per_position = tuple(
            count + (place < num_accepted) for place, count in enumerate(counts)
        )


class EngineMetrics:
    """Counts of one engine since its start; written by the engine's thread.

    Times are seconds of time.monotonic(). A request counts where it belongs as soon as it is
    known: its first token when that is there, all else when it has ended.

    Args:
        max_model_len: longest request, tokens.
        steps: counts of the runner; None where it keeps none.

    Attributes:
        finished: ended requests by finish_reason.
        cache_config: properties of the caches, by name.
    """

    def __init__(self, max_model_len: int, steps: StepCounters | None = None) -> None:
        self.steps = steps or StepCounters()
        self.cache_config: dict[str, str] = {}
        self.finished = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.time_to_first_token = Histogram(_FIRST_TOKEN_S)
        self.inter_token_latency = Histogram(_TOKEN_S)
        self.e2e_request_latency = Histogram(_REQUEST_S)
        self.request_queue_time = Histogram(_REQUEST_S)
        self.request_prefill_time = Histogram(_REQUEST_S)
        self.request_decode_time = Histogram(_REQUEST_S)
        # 1, 2, 5, 10, 20 ... up to ten millions
        bounds = [digit * 10**power for power in range(8) for digit in (1, 2, 5)]
        bounds = [bound for bound in bounds if bound < max_model_len]
        self.request_prompt_tokens = Histogram((*bounds, max_model_len))
        self.request_generation_tokens = Histogram((*bounds, max_model_len))
        self._last_step_time = 0.0

    def count_step(self, num_decode_tokens: int, resumed: Sequence[Request]) -> None:
        """Count the tokens of a step that has just ended.

        Args:
            num_decode_tokens: requests that got a token after that of the step before.
            resumed: requests that got theirs at the end of a prompt, the first one or, after a
                preemption, a later one.
        """
        now = time.monotonic()
        if num_decode_tokens:
            self.inter_token_latency.observe(now - self._last_step_time, num_decode_tokens)
        for request in resumed:
            if request.preempted_time is not None and len(request.output_token_ids) > 1:
                self.inter_token_latency.observe(now - request.preempted_time)
            elif (first := request.state.first_token_time) is not None:
                self.time_to_first_token.observe(first - request.state.arrival_time)
        self._last_step_time = now

    def count_end(self, request: Request) -> None:
        """Count a request that has ended, for whatever reason."""
        state = request.state
        arrival, first, end = state.arrival_time, state.first_token_time, state.finish_time
        if request.finish_reason is None or end is None:
            raise ValueError(f"request {state.request_id!r} has not ended")
        started = end if request.scheduled_time is None else request.scheduled_time
        self.finished[request.finish_reason] += 1
        self.e2e_request_latency.observe(end - arrival)
        self.request_queue_time.observe(started - arrival)
        self.request_prompt_tokens.observe(len(state.prompt_token_ids))
        self.request_generation_tokens.observe(len(state.token_ids))
        if first is not None:
            self.request_prefill_time.observe(first - started)
            self.request_decode_time.observe(end - first)
