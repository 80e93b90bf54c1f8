"""Worker: the demo model in the embedded engine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy as np

from benchmarks._harness import random_prompts
from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.engine.batch import ScheduledBatch
from fd_dsa.startup.build import build_engine

# number of timed decode steps, and of timed scans
_REPEATS = 15
_STREAM_PROMPT, _TOKENS_BEFORE = 64, 20
# part of a step -> path of its function from the engine
_PARTS = {
    "schedule": "scheduler.schedule",
    "complete": "scheduler.complete_step",
    "batch": "runner.input_batch.add_rows",
    "runner": "runner.execute_model",
    "metadata": "runner.initialize_forward_meta",
    "sampling and outputs": "_append",
    "sampling": "_sampler.sample",
}


class Engine:
    """The engine, built once, and the parts that are timed on their own.

    Args:
        fields: fields of EngineConfig.
    """

    def __init__(self, **fields: Any) -> None:
        # the baseline computes every prompt, and prompts come again in later runs
        defaults = {"max_num_seqs": 32, "kv_cache_memory_bytes": "4G", "speculative_config": "none"}
        config = EngineConfig(**(defaults | fields), enable_prefix_caching=False)
        self.engine = build_engine(config)
        self.llm = LLM.from_engine(self.engine)
        self._seconds: Counter[str] | None = None

    def _prompts(self, requests: int, tokens: int, seed: int) -> list[list[int]]:
        """Return random prompts, equal to the baseline's."""
        return random_prompts(requests, tokens, self.engine.runner.vocab_size, seed)

    def generate(
        self, requests: int, prompt_tokens: int, new_tokens: int, seed: int
    ) -> dict[str, Any]:
        """Return seconds to generate `new_tokens` for each of `requests` random prompts."""
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        prompts = self._prompts(requests, prompt_tokens, seed)
        start = time.perf_counter()
        first, outputs = 0.0, []
        for output in self.llm.generate(prompts, params, stream=True):
            first = first or time.perf_counter() - start
            if output.finished:
                outputs.append(output)
        seconds = time.perf_counter() - start
        counts = {len(output.token_ids) for output in outputs}
        if counts != {new_tokens}:
            raise RuntimeError(f"the engine returned {counts} new tokens")
        return {"seconds": seconds, "first_token_s": first}

    @contextmanager
    def _decoding(
        self, requests: int, context: int, steps: int, sampling: dict[str, Any] | None = None
    ) -> Iterator[None]:
        """Run requests of about `context` tokens, which decode for `steps` steps in the block."""
        # with steps until the last of many prompts is read
        tokens = steps + 64
        sampling = sampling or {"temperature": 0}
        params = SamplingParams(**sampling, max_tokens=tokens, ignore_eos=True)
        length = min(context, self.engine.limits.max_model_len - tokens)
        for index, prompt in enumerate(self._prompts(requests, length, seed=9)):
            self.engine.add_request(str(index), prompt, params)
        while len(self.engine.step()) < requests:
            pass
        yield
        for index in range(requests):
            self.engine.abort_request(str(index))

    def _step_s(self) -> float:
        """Make a step. Returns its seconds."""
        begin = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - begin

    def decode_ms(self, context: int) -> float:
        """Return median milliseconds of a decode step of one request."""
        with self._decoding(1, context, _REPEATS):
            return 1e3 * float(np.median([self._step_s() for _ in range(_REPEATS)]))

    def parts_us(
        self, requests: int, context: int, sampling: dict[str, Any], steps: int
    ) -> list[dict[str, float]]:
        """Return microseconds of each part in each of `steps` decode steps."""
        if self._seconds is None:
            # the clock costs two tenths of a microsecond a call, and no part is called more than
            # once a step
            self._seconds = Counter()
            for part, path in _PARTS.items():
                names, _, last = path.rpartition(".")
                owner = attrgetter(names)(self.engine) if names else self.engine
                setattr(owner, last, _timed(self._seconds, part, getattr(owner, last)))
            # every step has a new batch
            timed = _timed(self._seconds, "metrics", ScheduledBatch.record_latencies)
            setattr(ScheduledBatch, "record_latencies", timed)  # noqa: B010
        found = []
        with self._decoding(requests, context, steps, sampling):
            for _ in range(steps):
                self._seconds.clear()
                whole = self._step_s()
                found.append({part: 1e6 * s for part, s in _apart(self._seconds, whole).items()})
        return found

    def scan_ms(self, context: int) -> float:
        """Return median milliseconds of scoring and selecting in all layers, for one query."""
        import paddle

        from fd_dsa.ops.arrays import Scratch
        from fd_dsa.ops.logits.host_scores import PagedUnits, score_paged
        from fd_dsa.ops.topk import select_positions

        runner = self.engine.runner
        config, block = runner.model.config, runner.input_batch.block_size
        q = paddle.randn([1, 1, config.index_n_heads, config.index_head_dim])
        weights = paddle.randn([1, 1, config.index_n_heads])
        window = np.array([context])
        # pages of the cache in a scattered order, as a served request has them
        table = np.random.default_rng(0).permutation(-(-context // block)).astype(np.int32)[None]
        units = PagedUnits.build(window, table, block)
        caches = [cache for cache in runner.caches[1::2] if cache is not None]
        times, scratch = [], Scratch()
        for _ in range(_REPEATS):
            start = time.perf_counter()
            for cache in caches:
                logits = score_paged(q, weights, cache, units, scratch)
                select_positions(logits[0], window, config.index_topk)
            times.append(time.perf_counter() - start)
        return float(np.median(times) * 1e3)

    def _add(self, name: str, prompt: list[int], new_tokens: int) -> None:
        """Queue a greedy request."""
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        self.engine.add_request(name, prompt, params)

    def beside(self, prompt_tokens: int, seed: int) -> dict[str, Any]:
        """Return milliseconds between a stream's tokens during a prompt, and its seconds."""
        engine = self.engine
        self._add("stream", self._prompts(1, _STREAM_PROMPT, seed)[0], 4096)
        for _ in range(_TOKENS_BEFORE):
            engine.step()
        self._add("prompt", self._prompts(1, prompt_tokens, seed + 1000)[0], 1)
        begin = last = engine.clock()
        gaps, is_done = [], False
        while not is_done:
            names = {output.request_id for output in engine.step()}
            now = engine.clock()
            if "stream" not in names:
                raise RuntimeError("the stream got no token in a step")
            gaps.append(1e3 * (now - last))
            last, is_done = now, "prompt" in names
        engine.abort_request("stream")
        return {"gaps_ms": gaps, "seconds": last - begin}

    def alone(self, requests: int, prompt_tokens: int, seed: int) -> float:
        """Return seconds of prompts without a stream."""
        for index, prompt in enumerate(self._prompts(requests, prompt_tokens, seed)):
            self._add(str(index), prompt, 1)
        begin = self.engine.clock()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return self.engine.clock() - begin


def _timed(seconds: Counter[str], part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return wrap `call`, and add up its seconds."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - begin

    return timed


def _apart(seconds: Counter[str], whole: float) -> dict[str, float]:
    """Return seconds of parts that do not overlap, and the whole step."""
    own = {
        "schedule": seconds["schedule"] + seconds["complete"],
        "input batch": seconds["batch"],
        "step metadata": seconds["metadata"],
        "forward": seconds["runner"] - seconds["metadata"],
        "sampling": seconds["sampling"],
        "text and outputs": seconds["sampling and outputs"] - seconds["sampling"],
        "metrics": seconds["metrics"],
    }
    return {**own, "rest": whole - sum(own.values()), "whole step": whole}
