"""What an engine has done and holds, as one value."""

from __future__ import annotations

from dataclasses import dataclass


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
