"""Counters and histograms of an engine, for monitoring."""

from __future__ import annotations

from dataclasses import dataclass

from fd_dsa.runner.counters import Histogram, StepCounters

# bounds of vLLM's histograms of the same names, so that its dashboards fit
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
        num_running, num_waiting: requests with and without a batch row.
        num_blocks, num_used_blocks: blocks of the caches, and blocks that requests own.
        kv_cache_usage: share of the cache blocks that requests own, 0 to 1.
        num_steps, num_preemptions: steps and preemptions.
        prompt_tokens: prompt tokens of all requests so far.
        computed_prompt_tokens: prefill tokens that steps computed: prompts without their cached
            beginnings, and tokens that preempted requests computed again.
        generated_tokens: output tokens.
        prefix_cache_queries: prompt tokens looked up in the prefix cache, once a request.
        prefix_cache_hits: prompt tokens found there.
        prefix_cache_host_hits: of these, prompt tokens whose blocks came from host memory.
        host_cache_usage: share of the blocks in host memory that are in use, 0 to 1.
        host_time_s, runner_time_s: seconds spent in steps, outside and inside the runner.
        num_mask_waits: steps whose sampling was enqueued only after the host had the tokens of the
            step before. Masks of grammars and of bad words with several tokens need them.
        num_drafts: number of times that a step verified drafts of a request.
        num_draft_tokens, num_accepted_tokens: verified and accepted drafts.
        accepted_per_position: accepted drafts by position, the first draft of a request first.
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
    prefix_cache_host_hits: int = 0
    host_cache_usage: float = 0.0
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
    """Histograms of one engine since its start, which only the engine's thread writes.

    Values are seconds or tokens. The time to the first token is recorded with that token, all other
    values of a request are recorded at its end.

    Args:
        max_model_len: maximum length of a request, tokens.
        steps: counters of the runner, if it has some.

    Attributes:
        steps: counters of the runner's steps.
        finished: ended requests by finish_reason.
        cache_config: properties of the caches, by name.
        last_step_time: when the host got the newest tokens, seconds of time.monotonic().
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
        # 1, 2, 5, 10, 20 ... up to 5 * 10**7
        bounds = [digit * 10**power for power in range(8) for digit in (1, 2, 5)]
        bounds = [bound for bound in bounds if bound < max_model_len]
        self.request_prompt_tokens = Histogram((*bounds, max_model_len))
        self.request_generation_tokens = Histogram((*bounds, max_model_len))
        self.last_step_time = 0.0
