"""Worker: the demo model in the embedded engine, on the CPU or on the plug-in's device.

Each way to run it, eager or from graphs, has a process of its own, since a capture that fails may
end it. `benchmarks._harness.Worker` says how it is asked.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from typing import Any

from benchmarks._harness import random_prompts, serve_requests

CPU, EAGER, GRAPH = "cpu", "eager", "graph"
KV_CACHE_DTYPE = "fp8_ds_mla"
# the first steps of rows make views that the others find
_DROPPED_STEPS = 4


class Engine:
    """The engine of one way to run.

    Args:
        way: CPU, EAGER or GRAPH.
        form: of the plug-in; "real" has a GPU.
        sizes: numbers of rows of the captured steps.
        max_model_len, max_num_batched_tokens: as of the engine.
    """

    def __init__(
        self,
        way: str,
        form: str,
        sizes: tuple[int, ...],
        max_model_len: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.rig = None
        options: dict[str, Any] = {"kv_cache_dtype": KV_CACHE_DTYPE, "max_num_seqs": max(sizes)}
        options |= {"max_model_len": max_model_len, "enable_prefix_caching": False}
        options |= {"max_num_batched_tokens": max_num_batched_tokens}
        options["num_gpu_blocks_override"] = max(sizes) * -(-max_model_len // 64)
        if way != CPU:
            # before anything imports Paddle
            from tests.gpu_rig import load

            self.rig = load(form)
            is_real = self.rig.is_real
            if is_real:
                _take_custom_ops()
            options |= {"device": self.rig.device, "enforce_eager": way != GRAPH or not is_real}
            if way == GRAPH and is_real:
                options["cudagraph_capture_sizes"] = sizes
        from fd_dsa import LLM

        self.llm = LLM(**options)
        self.engine = self.llm._open_engine()
        if way == GRAPH and not options["enforce_eager"] and not self.engine.runner.captured_sizes:
            raise RuntimeError("decode steps were not captured; the log says why")
        if way == GRAPH and options["enforce_eager"]:
            from tests.gpu_rig.captures import stand_in

            self.engine.runner.capture_decode_graphs(sizes, stand_in)

    def facts(self) -> dict[str, Any]:
        """What was captured, and which operators of custom_ops/ serve."""
        from benchmarks._custom_ops import serving

        return {"captured": self.engine.runner.captured_sizes, "custom_ops": serving()}

    def tokens(self, prompts: list[str], max_tokens: int) -> list[list[tuple[int, float]]]:
        """Greedy tokens after each prompt, and how far each was ahead of the next candidate.

        Returns:
            (token, difference of the two best log-probabilities) for each prompt and step.
        """
        from fd_dsa import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2)
        return [
            [(token, _lead(step)) for token, step in zip(out.token_ids, out.logprobs, strict=True)]
            for out in self.llm.generate(prompts, params)
        ]

    def steps(self, rows: int, context: int, steps: int) -> dict[str, Any]:
        """Times of decode steps of so many rows that have about `context` tokens.

        Returns:
            `step_us` and `runner_us`, of each step; `counted`, what the plug-in counted in the
            last one, {} on the CPU.
        """
        from fd_dsa import SamplingParams

        engine, total = self.engine, steps + _DROPPED_STEPS
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        prompts = random_prompts(rows, context, engine.runner.vocab_size, seed=rows)
        names = [f"row {number}" for number in range(rows)]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, prompt, params)
        started: set[str] = set()
        while len(started) < rows:
            started.update(output.request_id for output in engine.step())
        times = [self._timed() for _ in range(total)][_DROPPED_STEPS:]
        counted = {}
        if self.rig is not None:
            with self.rig.counting() as found:
                engine.step()
            counted = found.delta
        for name in names:
            engine.abort_request(name)
        whole, inside = zip(*times, strict=True)
        return {"step_us": whole, "runner_us": inside, "counted": counted}

    def _timed(self) -> tuple[float, float]:
        """Microseconds of a step, and those of them inside the runner; it waits for the device."""
        before = self.engine.stats().runner_time_s
        begin = time.perf_counter()
        self.engine.step()
        seconds = time.perf_counter() - begin
        return seconds * 1e6, (self.engine.stats().runner_time_s - before) * 1e6

    def close(self) -> None:
        """End the engine; graphs go before the process does."""
        self.engine.runner.graphs = None
        self.llm.close()
        gc.collect()


def _lead(step: Any) -> float:
    """How far the best candidate of a step is ahead of the second, in log-probability."""
    (_, best), (_, second) = step.score.top[:2]
    return best - second


def _take_custom_ops() -> None:
    """Let the kernels of custom_ops/ serve where nvcc builds them."""
    from benchmarks import _custom_ops
    from fd_dsa import custom_ops

    custom_ops.use_library(_custom_ops.library())


def main() -> None:
    """Serve the requests of a parent: way, form, sizes and limits are the arguments."""
    way, form, sizes, longest, tokens = sys.argv[1:]
    # no log line may come between the answers
    os.environ.setdefault("GLOG_minloglevel", "2")
    engine = Engine(way, form, tuple(map(int, sizes.split(","))), int(longest), int(tokens))
    try:
        serve_requests(engine)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
