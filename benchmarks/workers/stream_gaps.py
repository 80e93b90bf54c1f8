"""Worker: the demo model in the embedded engine, a stream and prompts beside it."""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks._harness import random_prompts, serve_requests
from fd_dsa import SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.engine.factory import build_engine
from fd_dsa.environment import set_cpu_threads

_STREAM_PROMPT, _TOKENS_BEFORE = 64, 20


class Gaps:
    """An engine with one target.

    Args:
        target_ms: see EngineConfig.target_inter_token_latency_ms.
        by_processor: whether times are processor seconds of one thread, also those that the
            engine measures: what an idle machine with one processor would take.
    """

    def __init__(self, target_ms: float, by_processor: bool) -> None:
        config = EngineConfig(
            max_num_seqs=8,
            kv_cache_memory_bytes="1G",
            enable_prefix_caching=False,
            target_inter_token_latency_ms=target_ms,
        )
        self._engine = build_engine(config)
        if by_processor:
            set_cpu_threads(1)
            self._engine.clock = time.process_time

    def _add(self, name: str, prompt: list[int], new_tokens: int) -> None:
        """Queue a greedy request."""
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        self._engine.add_request(name, prompt, params)

    def _random(self, requests: int, tokens: int, seed: int) -> list[list[int]]:
        """Random prompts."""
        return random_prompts(requests, tokens, self._engine.runner.vocab_size, seed)

    def beside(self, prompt_tokens: int, seed: int) -> dict[str, Any]:
        """Milliseconds between a stream's tokens while a prompt is computed, and its seconds."""
        engine = self._engine
        self._add("stream", self._random(1, _STREAM_PROMPT, seed)[0], 4096)
        for _ in range(_TOKENS_BEFORE):
            engine.step()
        self._add("prompt", self._random(1, prompt_tokens, seed + 1000)[0], 1)
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

    def alone(self, requests: int, prompt_tokens: int, seed: int) -> dict[str, Any]:
        """Seconds of prompts without an answer that goes on."""
        for index, prompt in enumerate(self._random(requests, prompt_tokens, seed)):
            self._add(str(index), prompt, 1)
        begin = self._engine.clock()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return {"seconds": self._engine.clock() - begin}


if __name__ == "__main__":
    worker = Gaps(float(sys.argv[1]), sys.argv[2] == "processor")
    serve_requests({"beside": worker.beside, "alone": worker.alone})
