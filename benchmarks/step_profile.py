"""Time of a decode step, part by part, before and after a change.

    python -m benchmarks.step_profile                        # about two minutes on 2 cores
    python -m benchmarks.step_profile --baseline CHECKOUT    # the package of another checkout first

The embedded engine runs the demo model, and its parts are timed at their calls. The two packages
take turns. The cost of serving is the processor time of the event loop's thread in a real server,
per step of all streams. A minimal client reads the streams. Writes
benchmarks/results/step_profile.json.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import Worker, compare_packages, in_turns, workers
from benchmarks._serving import served

# requests, tokens of context, how they are sampled
CASES: tuple[tuple[int, int, str, dict[str, Any]], ...] = (
    (1, 512, "greedy", {"temperature": 0}),
    (32, 256, "greedy", {"temperature": 0}),
    (32, 256, "temperature 1", {"temperature": 1}),
    (32, 256, "top-p 0.95", {"temperature": 1, "top_p": 0.95}),
)
ROUNDS, STEPS, SERVED_TOKENS = 4, 25, 96


def profile(packages: dict[str, Worker], rounds: int) -> list[dict[str, Any]]:
    """Return median microseconds of every part of each case, the packages in turn."""
    found = []
    for requests, context, name, sampling in CASES:
        case = {"requests": requests, "context": context, "sampling": sampling, "steps": STEPS}
        calls = {k: partial(worker.call, op="parts_us", **case) for k, worker in packages.items()}
        sides = {}
        for label, answers in in_turns(calls, rounds).items():
            steps = [us for answer in answers for us in answer]
            us = {part: float(np.median([step[part] for step in steps])) for part in steps[0]}
            sides[label] = us
            parts = ", ".join(f"{part} {value:.0f}" for part, value in us.items())
            print(f"{requests:3} x {context} {name:14} {label:7} us: {parts}", flush=True)
        found.append({"requests": requests, "context": context, "sampling": name, "us": sides})
    return found


def serving(checkouts: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Return microseconds of the event loop's thread a step, for one stream and for 32."""
    found = []
    with contextlib.ExitStack() as stack:
        servers = {label: stack.enter_context(served(path)) for label, path in checkouts.items()}
        for requests in (1, 32):
            case = {"requests": requests, "prompt_tokens": 64, "new_tokens": SERVED_TOKENS}
            calls = {label: partial(server, **case) for label, server in servers.items()}
            us = {
                label: 1e6 * float(np.median([a["serve_cpu_s"] for a in answers])) / SERVED_TOKENS
                for label, answers in in_turns(calls, rounds, seeded=True).items()
            }
            found.append({"requests": requests, "us": us})
            print(f"{requests:3} streams, event loop, us a step: {us}", flush=True)
    return found


def measure(checkouts: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Measure the parts of a step and the cost of serving, the older package at the front."""
    checkouts = dict(reversed(checkouts.items()))
    with workers("benchmarks.workers.ours:Engine", checkouts) as sides:
        cases = profile(sides, rounds)
    return {"cases": cases, "serving": serving(checkouts, rounds)}


main = partial(compare_packages, "step_profile", __doc__, measure, ROUNDS)

if __name__ == "__main__":
    sys.exit(main())
