"""What counting for /metrics costs: per step and per request.

    python -m benchmarks.metrics_cost

The counters run alone, as the engine calls them, without a model: a step's share of them does not
depend on the batch, which the table shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from fd_dsa.engine.metrics import EngineMetrics
from fd_dsa.engine.output import OutputState
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.runner.input_batch import InputBatch

_ROUNDS = 25
_CALLS = 2000


def microseconds(call: Callable[[], object]) -> float:
    """Median time of a call."""
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for _ in range(_CALLS):
            call()
        times.append((time.perf_counter() - begin) / _CALLS)
    return 1e6 * median(times)


def decode_batch(num_rows: int) -> InputBatch:
    """Rows that decode, each past 2048 keys."""
    batch = InputBatch(num_rows, num_rows, 64, 64)
    batch.begin_step()
    for row in range(num_rows):
        batch.add_row(row, [1], 3000 + row, is_prefill=False)
    return batch


def ended_request() -> Request:
    """A request that is over."""
    request = Request(
        state=OutputState("a", 0, [1] * 100, arrival_time=1.0),
        params=SamplingParams(),
        max_tokens=10,
        end_token_ids=frozenset(),
        arrival=0,
        seed=0,
        detokenizer=None,  # type: ignore[arg-type]
        stop_checker=None,
        block_size=64,
    )
    request.scheduled_time, request.state.first_token_time = 1.1, 1.2
    request.finish("length", 2.0)
    return request


def main() -> None:
    """Print the table."""
    metrics = EngineMetrics(8192)
    request = ended_request()
    print("| rows that decode | engine's part of a step, us | runner's part of a step, us |")
    print("|---|---|---|")
    for num_rows in (1, 32, 256):
        batch = decode_batch(num_rows)

        def count_in_runner(batch: InputBatch = batch) -> None:
            sparse = batch.num_tokens_past(2048)
            metrics.steps.count_step(1e-4, batch.num_tokens, 0, sparse, False)

        engine = microseconds(lambda rows=num_rows: metrics.count_step(rows, []))
        print(f"| {num_rows} | {engine:.2f} | {microseconds(count_in_runner):.2f} |")
    print(f"\nend of a request: {microseconds(lambda: metrics.count_end(request)):.2f} us")


if __name__ == "__main__":
    main()
