"""Processor time of sampling 32 rows of 129,280 logits, and whether the tokens stay the same.

    python -m benchmarks.sampler --baseline CHECKOUT     # about ten minutes on 2 cores

The packages of this tree and of a checkout take turns. Logits are normal, of standard deviation 3,
or have the spread that the demo model's logits have over a text, on more ids (`workers/sampler`).
Then each draws from fresh rows, 10,000 tokens in each way, and those that differ are counted.
Writes benchmarks/results/sampler.json.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

from benchmarks._harness import Worker, compare_packages, in_turns, percentiles, workers
from benchmarks.workers.sampler import write_demo_logits

SPREADS = ("normal", "demo model")
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "top-p 0.9, temperature 0.7": {"top_p": 0.9, "temperature": 0.7},
    "min-p 0.05": {"min_p": 0.05},
    "min-p 0.02, top-p 0.9": {"min_p": 0.02, "top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
}
# addresses are random and fixed for the life of a process, so several processes are measured
PROCESSES, ROUNDS, REPEATS = 3, 4, 3
# steps of 32 rows: 10,016 draws
STEPS = 313
MODULE = "benchmarks.workers.sampler:Sampling"
Sides = dict[str, Worker]


def measure(path: str, checkouts: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of processor time of each case, the packages in turn."""
    names = list(product(SPREADS, SAMPLING))
    times: dict[Any, dict[str, list[float]]] = {case: {} for case in names}
    for _ in range(PROCESSES):
        with workers(MODULE, checkouts, path=path) as sides:
            for spread, name in names:
                case = {"spread": spread, "sampling": SAMPLING[name], "repeats": REPEATS}
                calls = {k: partial(side.call, op="cpu_ms", **case) for k, side in sides.items()}
                for label, answers in in_turns(calls, rounds).items():
                    times[spread, name].setdefault(label, []).extend(chain(*answers))
    found = []
    for spread, name in names:
        ms = {label: percentiles(values) for label, values in times[spread, name].items()}
        ratio = ms["before"]["p50"] / ms["fd_dsa"]["p50"]
        found.append({"spread": spread, "sampling": name, "ms": ms, "ratio": ratio})
        line = ", ".join(f"{label} {value['p50']:.2f} ms" for label, value in ms.items())
        print(f"{spread:10} {name:28} {line}: {ratio:.2f}x", flush=True)
    return found


def differing(sides: Sides, cases: list[dict[str, Any]], steps: int) -> None:
    """Count draws and those whose tokens differ, into the cases."""
    for spread in SPREADS:
        counts = dict.fromkeys(SAMPLING, 0)
        for index in range(steps):
            ours, before = (
                worker.call(
                    op="tokens", spread=spread, index=index, samplings=list(SAMPLING.values())
                )
                for worker in sides.values()
            )
            for name, a, b in zip(SAMPLING, ours, before, strict=True):
                counts[name] += sum(x != y for x, y in zip(a, b, strict=True))
        for case in cases:
            if case["spread"] == spread:
                case |= {"draws": steps * len(ours[0]), "differing": counts[case["sampling"]]}
        print(f"{spread}: of {steps * len(ours[0])} draws differ {counts}", flush=True)


def compare(checkouts: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Times and draws of both packages."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "demo_logits.npy")
        write_demo_logits(path)
        cases = measure(path, checkouts, rounds)
        with workers(MODULE, checkouts, path=path) as sides:
            differing(sides, cases, STEPS)
    return {"cases": cases}


main = partial(compare_packages, "sampler", __doc__, compare, ROUNDS, needs_baseline=True)

if __name__ == "__main__":
    sys.exit(main())
