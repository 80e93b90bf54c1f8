"""Host time of a step by number of requests.

    python -m benchmarks.growth                         # about five minutes on 2 cores
    python -m benchmarks.growth --baseline CHECKOUT     # and the package of another checkout

`LLMEngine.step` is timed over a runner that does nothing. So the time is that of scheduling, the
input batch, sampling, text and outputs. It is fitted as a + b * requests, for the vocabularies of
the demo model and of DeepSeek-V3.2. With a baseline the two packages take turns.
Writes benchmarks/results/growth.json.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import Worker, compare_packages, in_turns, percentiles, workers

REQUESTS = (1, 8, 32, 64, 128, 256)
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {"temperature": 1},
    "top-p 0.95": {"temperature": 1, "top_p": 0.95},
    "top-k 50": {"temperature": 1, "top_k": 50},
}
# vocabulary -> steps timed in a round
STEPS = {4096: 25, 129_280: 5}
ROUNDS = 6


def host_times(sides: dict[str, Worker], rounds: int) -> list[dict[str, Any]]:
    """Return microseconds of a step's host work for each way of sampling, the sides in turn."""
    found = []
    for (vocab_size, steps), (name, sampling) in product(STEPS.items(), SAMPLING.items()):
        case = {"op": "host_us", "sampling": sampling, "steps": steps, "vocab_size": vocab_size}
        calls = {
            (label, n): partial(worker.call, requests=n, **case)
            for n, (label, worker) in product(REQUESTS, sides.items())
        }
        answers = in_turns(calls, rounds)
        us = {key: [x for a in found for x in a["us"]] for key, found in answers.items()}
        fitted = {label: _fitted({n: us[label, n] for n in REQUESTS}) for label in sides}
        found.append({"vocab_size": vocab_size, "sampling": name, "sides": fitted})
        for label, side in fitted.items():
            line = f"{side['a_us']:.0f} us + {side['b_us']:.2f} us a request"
            print(f"{vocab_size:7} {name:14} {label:8} {line}", flush=True)
    return found


def _fitted(times: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """Return percentiles by requests, and their medians as a + b * requests."""
    us = {n: percentiles(values) for n, values in times.items()}
    # relative errors have equal weights, so that a step of 256 requests does not dominate
    medians = np.array([us[n]["p50"] for n in REQUESTS])
    b, a = np.polyfit(REQUESTS, medians, 1, w=1 / medians)
    return {"us": {str(n): value for n, value in us.items()}, "a_us": float(a), "b_us": float(b)}


def measure(checkouts: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Return host times of all packages."""
    with workers("benchmarks.workers.engine_host", checkouts) as sides:
        host_time = host_times(sides, rounds)
        case = {"op": "pass_us", "requests": REQUESTS[-1]}
        passes = {n: sides["fd_dsa"].call(**case, steps=STEPS[n], vocab_size=n) for n in STEPS}
    pass_us = {str(n): percentiles(answer["us"]) for n, answer in passes.items()}
    return {"host_time": host_time, "pass_us": pass_us}


main = partial(compare_packages, "growth", __doc__, measure, ROUNDS)

if __name__ == "__main__":
    sys.exit(main())
