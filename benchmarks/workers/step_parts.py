"""Worker: the demo model in the embedded engine, its decode steps timed part by part."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks._harness import random_prompts, serve_requests

# part -> where it is, from the engine on
_TIMED = {
    "schedule": "_scheduler.schedule",
    "complete": "_scheduler.complete_step",
    "batch": "_assemble",
    "runner": "runner.execute_model",
    "metadata": "runner.initialize_forward_meta",
    "sampling and outputs": "_sample",
    "sampling": "_sampler.sample",
    "metrics": "metrics.count_step",
}


class Parts:
    """An engine whose parts are timed where they are called.

    The clock costs two tenths of a microsecond a call, and no part is called more than once a
    step.
    """

    def __init__(self) -> None:
        from fd_dsa.config import EngineConfig
        from fd_dsa.engine.factory import build_engine

        self._engine = build_engine(
            EngineConfig(max_num_seqs=32, kv_cache_memory_bytes="4G", enable_prefix_caching=False)
        )
        self._seconds: Counter[str] = Counter()
        for part, path in _TIMED.items():
            owner: Any = self._engine
            *names, last = path.split(".")
            for name in names:
                owner = getattr(owner, name)
            setattr(owner, last, self._timed(part, getattr(owner, last)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose seconds are added up."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._seconds[part] += time.perf_counter() - begin

        return timed

    def decode(
        self, requests: int, context: int, sampling: dict[str, Any], steps: int
    ) -> dict[str, Any]:
        """Microseconds of each part in each of `steps` decode steps at about `context` tokens."""
        from fd_dsa import SamplingParams

        engine = self._engine
        params = SamplingParams(**sampling, max_tokens=steps + 64, ignore_eos=True)
        for index, prompt in enumerate(
            random_prompts(requests, context, engine.runner.vocab_size, seed=9)
        ):
            engine.add_request(str(index), prompt, params)
        while len(engine.step()) < requests:
            pass
        found = []
        for _ in range(steps):
            self._seconds.clear()
            begin = time.perf_counter()
            engine.step()
            whole = time.perf_counter() - begin
            found.append({part: 1e6 * s for part, s in _apart(self._seconds, whole).items()})
        for index in range(requests):
            engine.abort_request(str(index))
        return {"us": found}


def _apart(seconds: Counter[str], whole: float) -> dict[str, float]:
    """Seconds of parts that do not overlap, and the whole step."""
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


if __name__ == "__main__":
    serve_requests({"decode": Parts().decode})
