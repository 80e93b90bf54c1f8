"""Worker: the engine whose captured decode steps fork to a second stream, and do not, in turns."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks._harness import percentiles
from benchmarks.workers import gpu_engine
from fd_dsa.environment import OVERLAP_VARIABLE

ONE, TWO = "one stream", "two streams"
# steps of a turn that begin with queued work of the turn before
_LEFT_OUT = 4


class Engine(gpu_engine.Engine):
    """The engine of `gpu_engine`.

    Args:
        most: tokens of a step that forks, for all ranks; None: as served.
        others: options of the base.
    """

    def __init__(self, most: int | None, **others: Any) -> None:
        if most is not None:
            # ranks are child processes
            os.environ[OVERLAP_VARIABLE] = str(most)
        self._graphs: dict[str, Any] = {}
        super().__init__(**others)

    def capture_both(self) -> dict[str, Any]:
        """Capture the decode steps without forks, and with forks of all sizes, on a device only."""
        runner, sizes = self._engine.runner, self._engine.runner.captured_sizes
        for name, most in ((ONE, 0), (TWO, 1 << 30)):
            if sizes:
                from fd_dsa.runner.step_graphs import PaddleCapture
                from fd_dsa.startup.capture import capture_graphs
                from fd_dsa.triton_runtime import warming

                overlap = runner.attn_backends[0].overlap
                overlap.max_tokens = most
                with warming(), overlap.as_captured():
                    capture_graphs(runner, sizes, PaddleCapture)
            self._graphs[name] = runner.graphs
        return {"sizes": sizes}

    def decode_in_turns(self, batch: int, prompt: int, turns: int, steps: int) -> dict[str, Any]:
        """Return milliseconds of decode steps of `batch` rows, with both graphs in turn.

        Returns:
            percentiles by name of the graphs.
        """
        runner, times = self._engine.runner, {name: [] for name in self._graphs}
        self._submit(batch, prompt, batch * prompt // self._chunk + turns * steps + 16)
        while len(self._engine.step()) < batch:
            if not self._engine.has_unfinished_requests():
                raise RuntimeError(f"{batch} requests never decode together")
        for turn in range(turns):
            # of four turns the middle two are of one kind: a drift cancels out
            name = (ONE, TWO, TWO, ONE)[turn % 4]
            runner.graphs = self._graphs[name]
            before = time.perf_counter()
            for step in range(steps):
                given, now = len(self._engine.step()), time.perf_counter()
                if step >= _LEFT_OUT and given == batch:
                    times[name].append(1e3 * (now - before))
                before = now
        self._drain()
        return {name: percentiles(values) for name, values in times.items()}
