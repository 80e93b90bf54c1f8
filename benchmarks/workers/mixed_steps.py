"""Worker: an engine whose steps have decode rows and a prompt, of a given number of tokens."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks._harness import percentiles
from benchmarks.workers import gpu_engine

# steps before those that count
_WARM = 6


class Engine(gpu_engine.Engine):
    """The engine of `gpu_engine`, with answers that run for as long as it measures.

    Args:
        options: arguments of the base.
    """

    def __init__(self, **options: Any) -> None:
        self._capture_s, self._num_added, self._streams = 0.0, 0, 0
        self._rng, self._prefix = np.random.default_rng(0), list[int]()
        super().__init__(**options)

    def prepare(self) -> None:
        """Time the captures of the start."""
        from fd_dsa.startup import warm_up

        capture = warm_up.capture_graphs

        def timed(*args: Any, **kwargs: Any) -> None:
            begin = time.perf_counter()
            capture(*args, **kwargs)
            self._capture_s += time.perf_counter() - begin

        warm_up.capture_graphs = timed

    def capture_seconds(self) -> float:
        """Return the time of all captures of the start, 0 without captures."""
        return self._capture_s

    def begin(self, rows: int, context: int, prefix: int, new: int) -> dict[str, int]:
        """Start answers that decode, and cache the tokens that all prompts begin with.

        Args:
            rows: number of answers.
            context: tokens of the prompt of each answer.
            prefix: tokens before the new tokens of each further prompt.
            new: maximum number of tokens of an answer.
        """
        self._engine.abort_all()
        self._engine.step()
        self._streams = rows
        self._submit(rows, context, new)
        self._prefix = self._ids(prefix)
        if prefix:
            self._add(1)
        while len(self._engine.step()) < rows or self._engine.stats().num_running > rows:
            pass
        return {"rows": self._engine.stats().num_running}

    def steps(self, tokens: int, steps: int) -> dict[str, Any]:
        """Return milliseconds of steps with one prompt beside all answers.

        Args:
            tokens: tokens of each step, with one of each answer.
            steps: number of steps.

        Returns:
            percentiles of the time between two steps, the tokens that the steps had, and the share
            of steps that a graph served.
        """
        times, seen, captured, before = [], set(), [], 0.0
        for step in range(_WARM + steps):
            self._run(tokens)
            now, runner = time.perf_counter(), self._engine.runner
            if step >= _WARM:
                times.append(1e3 * (now - before))
                seen.add(runner.input_batch.num_tokens)
                captured.append(runner.graph_key is not None)
            before = now
        return {"ms": percentiles(times), "tokens": sorted(seen), "captured": np.mean(captured)}

    def busy(self, tokens: int, steps: int) -> dict[str, Any]:
        """Return the time that the GPU works in such a step, and its kernels."""
        from torch.profiler import ProfilerActivity, profile

        recorder = profile(activities=[ProfilerActivity.CUDA])
        for _ in range(_WARM):
            self._run(tokens)
        with recorder:
            for _ in range(steps):
                self._run(tokens)
        return gpu_engine.profiled(recorder.events(), steps)

    def _run(self, tokens: int) -> None:
        """Run a step of all answers and a new prompt, which fills it."""
        self._add(tokens - self._streams)
        self._engine.step()

    def _add(self, tokens: int) -> None:
        """Add a request whose prompt has new tokens after those that all prompts share."""
        from fd_dsa import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        self._num_added += 1
        ids = self._prefix + self._ids(tokens)
        self._engine.add_request(f"prompt-{self._num_added}", ids, params)

    def _ids(self, tokens: int) -> list[int]:
        """Return random token ids."""
        ids: list[int] = self._rng.integers(10, self._engine.runner.vocab_size, tokens).tolist()
        return ids
