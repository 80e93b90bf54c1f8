"""Worker: the demo model in the embedded engine."""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from typing import Any

import numpy as np

from benchmarks._harness import random_prompts, serve_requests
from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.engine.factory import build_engine
from fd_dsa.environment import set_cpu_threads

# a decode step is timed this often, the scan as well
_REPEATS = 15


class Engine:
    """The engine, built once, and the parts that are timed on their own."""

    def __init__(self, threads: int | None) -> None:
        # the baseline computes every prompt, and prompts come again in later runs
        self.engine = build_engine(
            EngineConfig(max_num_seqs=32, kv_cache_memory_bytes="4G", enable_prefix_caching=False)
        )
        self.llm = LLM.from_engine(self.engine)
        if threads is not None:
            set_cpu_threads(threads)

    def _prompts(self, requests: int, tokens: int, seed: int) -> list[list[int]]:
        """Random prompts, the same as the baseline's."""
        return random_prompts(requests, tokens, self.engine.runner.vocab_size, seed)

    def generate(
        self, requests: int, prompt_tokens: int, new_tokens: int, seed: int
    ) -> dict[str, Any]:
        """Seconds to generate `new_tokens` for each of `requests` random prompts."""
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

    def _decode_steps(self, requests: int, context: int, steps: int, profiler: Any = None):
        """Seconds of each of `steps` decode steps at about `context` tokens."""
        params = SamplingParams(temperature=0, max_tokens=steps + 2, ignore_eos=True)
        length = min(context, self.engine.max_model_len - steps - 2)
        for i, prompt in enumerate(self._prompts(requests, length, seed=9)):
            self.engine.add_request(f"decode-{i}", prompt, params)
        times: list[float] = []
        started: set[str] = set()
        while self.engine.has_unfinished_requests():
            decoding = len(started) == requests
            if profiler and decoding:
                profiler.enable()
            start = time.perf_counter()
            outputs = self.engine.step()
            seconds = time.perf_counter() - start
            if profiler and decoding:
                profiler.disable()
            if decoding:
                times.append(seconds)
            started.update(output.request_id for output in outputs)
        return times

    def decode_ms(self, context: int) -> dict[str, Any]:
        """Median milliseconds of a decode step of one request."""
        return {"ms": float(np.median(self._decode_steps(1, context, _REPEATS)) * 1e3)}

    def scan_ms(self, context: int) -> dict[str, Any]:
        """Median milliseconds of scoring and selecting alone, all layers, one query."""
        import paddle

        from fd_dsa.ops._host import Scratch
        from fd_dsa.ops.logits.paddle_impl import PagedUnits, score_paged
        from fd_dsa.ops.topk.paddle_impl import select_positions

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
        return {"ms": float(np.median(times) * 1e3)}

    def profile(self, requests: int, context: int) -> dict[str, Any]:
        """Where a decode step spends its time: the functions with the most time of their own."""
        times = self._decode_steps(requests, context, 5)
        profiler = cProfile.Profile()
        steps = len(self._decode_steps(requests, context, 10, profiler))
        stats: Any = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
        total = sum(entry[2] for entry in stats.values())
        busiest = sorted(stats.items(), key=lambda item: -item[1][2])[:15]
        return {
            "requests": requests,
            "context": context,
            "ms": float(np.median(times) * 1e3),
            "functions": [
                {
                    "name": f"{key[0].rpartition('/')[2]}:{key[2]}",
                    "calls_per_step": entry[0] / steps,
                    "share": entry[2] / total,
                }
                for key, entry in busiest
            ],
        }


if __name__ == "__main__":
    engine = Engine(int(sys.argv[1]) if len(sys.argv) > 1 else None)
    names = ("generate", "decode_ms", "scan_ms", "profile")
    serve_requests({name: getattr(engine, name) for name in names})
